"""`hf://OWNER/REPO[@REVISION][/PATH]` -> a path on this machine, through huggingface_hub and its cache."""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path

from afd_data.errors import UserError

# What weights, configs and tokenizers are made of; nothing else is fetched, above all no code and no other pickles.
SAFE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")
ENCODERS = ["text_encoder*/*", "tokenizer*/*", "image_encoder/*", "vae/*"]
SINGLE_FILES = (".pt", ".pth", ".safetensors", ".json")
_SOURCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?")


def local_path(source: str | Path, what: str) -> Path:
    """The file or folder that `source` means: a path as it stands, or what is downloaded from the Hub.

    `what` is the recipe's key, for messages.  Raises UserError: not there, no access, no network, or not a Hub address.
    """
    if not str(source).startswith("hf://"):
        return Path(source)
    match = _SOURCE.fullmatch(str(source))
    if match is None or ".." in (match["path"] or "").split("/"):
        raise UserError(f"{what}: {source!r} is not hf://OWNER/REPO[@REVISION][/PATH]")
    return _download(match["repo"], match["revision"], (match["path"] or "").strip("/"), f"{what}: {source}")


def _download(repo: str, revision: str | None, path: str, where: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is said below
    try:
        if Path(path).suffix in SINGLE_FILES:
            return Path(hf_hub_download(repo, path, revision=revision))
        # In these patterns a star also stands for slashes.
        inside = f"{glob.escape(path)}/" if path else ""
        patterns = [inside + pattern for pattern in SAFE_FILES]
        # A whole repository is a student's or a pipeline's: its encoders, of many gigabytes, are not asked for here.
        ignored = None if path else ENCODERS
        found = snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        folder = Path(found) / path
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
            f"{where}: the Hub cannot be reached and it was not downloaded before ({_line(error)}). Run again, or name "
            "a local path."
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{where}: the repository has no such file") from None
    except OSError as error:  # the client's errors of HTTP are some too
        raise UserError(f"{where}: cannot be downloaded ({_line(error)}). Run again, or name a local path.") from None
    if not folder.exists():
        raise UserError(f"{where}: the repository has no such folder, or nothing in it that is safe to load")
    return folder


def _line(error: BaseException) -> str:
    """The client's errors explain at length."""
    return " ".join(str(error).split())[:200]
