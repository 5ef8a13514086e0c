"""The Hub's names, and its client's errors in words that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from afd_data.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LINE = 300  # characters shown of what the client says


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


@contextmanager
def explained_reading(where: str, revision: str | None = None) -> Iterator[None]:
    """What the client raises at a download, as UserError that begins with `where`."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is said below
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{where}: {error}") from None
    except GatedRepoError:
        raise UserError(f"{where}: gated; accept its terms on the Hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"{where}: no such repository, or no access; `hf auth login` for a private one") from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: the repository has no branch, tag or commit {revision!r}") from None
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{where}: the Hub cannot be reached and it was not downloaded before ({short(error)}). Run again, or name "
            "a local path."
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{where}: the repository has no such file") from None
    except (OSError, HTTPError) as error:
        raise UserError(f"{where}: cannot be downloaded ({short(error)}). Run again, or name a local path.") from None


@contextmanager
def explained_writing(repo: str, token: str) -> Iterator[None]:
    """What the client raises at a push, as UserError that begins with `repo` and does not show the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise UserError(f"{repo}: {_refusal(error, token)}") from None
    except UserError:
        raise
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{repo}: the Hub cannot be reached ({short(error, token)}); what readers see is as it was. Run it again."
        ) from None
    except (RuntimeError, ValueError) as error:  # an upload that failed, a head of the card that the Hub refuses
        cause = error.__cause__ or error
        also = short(cause, token) if cause is not error else ""
        raise UserError(f"{repo}: {short(error, token)} {also}".rstrip()) from None


def _refusal(error: HfHubHTTPError, token: str) -> str:
    """What the Hub said, and what to do."""
    said = short(error, token)
    match error.response.status_code:
        case 401:
            return "the Hub does not know your token; run `hf auth login` again, or set HF_TOKEN to one that is valid"
        case 403:
            return f"your token may not write there; use your own name as OWNER, or a token that may write ({said})"
        case 404:
            return "no such repository, or no access to it"
        case 409 | 412:
            return "somebody else changed it meanwhile; it is as they left it. Run the same again."
    return f"the Hub answered with an error ({said}); what readers see is as it was. Run the same again."


def short(error: BaseException, token: str = "") -> str:
    """One line without the token; the client's errors explain at length."""
    line = " ".join(str(error).split())
    return (line.replace(token, "***") if token else line)[:LINE]
