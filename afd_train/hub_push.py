"""Files -> one commit of a model repository on the Hub, and the client's errors in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TEXTS = (".json", ".jsonl", ".md", ".yaml", ".txt")


def commit_files(
    repo: str, files: Mapping[str, Path | bytes], managed: Sequence[str], private: bool, message: str
) -> str:
    """Make `repo` (OWNER/NAME) hold `files` beside what it has; returns its address.

    managed: patterns of names that are taken away where `files` does not have them.  Contents that are there already
    are not sent, and where nothing differs there is no commit.  Raises UserError: no token, a token among the files, no
    such name, no rights, no network, another push at the same time, a public repository although `private`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    token = get_token()
    if token is None:
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write")
    _check_no_token(files, token)
    api = HfApi(token=token, library_name="afd")
    with _explained(repo, token):
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        info = api.model_info(repo)
        if private and not info.private:
            raise UserError(f"{repo}: is there and public; make it private on the Hub first, or leave out --private")
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = [path for path in there if path not in files and any(fnmatchcase(path, pattern) for pattern in managed)]
        api.create_commit(
            repo,
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, content) for path, content in files.items()),
            ],
            commit_message=message,
            parent_commit=info.sha,
        )
    return url


def checked_name(repo: str) -> str:
    """`repo` again.  Raises UserError when it is not OWNER/NAME as the Hub wants them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    problem = UserError(f"{repo!r}: not the name of a repository; it is OWNER/NAME of letters, digits, -, _ and .")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise problem from None
    if "/" not in repo:  # the client would take it for one of the user's own
        raise problem
    return repo


def _check_no_token(files: Mapping[str, Path | bytes], token: str) -> None:
    for path, content in files.items():
        if Path(path).suffix in TEXTS:
            data = content if isinstance(content, bytes) else content.read_bytes()
            if token.encode() in data:
                raise UserError(f"{path}: has your token for the Hub in it; remove it there. Nothing was sent.")


@contextmanager
def _explained(repo: str, token: str) -> Iterator[None]:
    """What the client raises, as UserError."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(f"{repo}: {_refusal(error, token)}") from None
    except UserError:
        raise
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{repo}: the Hub cannot be reached ({_line(error, token)}); the repository is as it was. Run it again."
        ) from None
    except (RuntimeError, ValueError) as error:  # an upload that failed, a head of the card that the Hub refuses
        cause = error.__cause__ or error
        raise UserError(f"{repo}: {_line(error, token)} {_line(cause, token) if cause is not error else ''}") from None


def _refusal(error: HfHubHTTPError, token: str) -> str:
    """What the Hub said, and what to do."""
    said = _line(error, token)
    match error.response.status_code:
        case 401:
            return "the Hub does not know your token; run `hf auth login` again, or set HF_TOKEN to one that is valid"
        case 403:
            return f"your token may not write there; use your own name as OWNER, or a token that may write ({said})"
        case 404:
            return "no such repository, or no access to it"
        case 409 | 412:
            return "somebody else changed it meanwhile; it is as they left it. Run the same again."
    return f"the Hub answered with an error ({said}); the repository is as it was. Run the same again."


def _line(error: BaseException, token: str) -> str:
    return " ".join(str(error).split())[:300].replace(token, "***")
