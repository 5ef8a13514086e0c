"""`hf://OWNER/REPO[@REVISION][/PATH]` -> a path on this machine, through huggingface_hub and its cache."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from afd_data.errors import UserError
from afd_data.hub import explained_reading

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

    with explained_reading(where, revision):
        if Path(path).suffix in SINGLE_FILES:
            return Path(hf_hub_download(repo, path, revision=revision))
        # In these patterns a star also stands for slashes.
        inside = f"{glob.escape(path)}/" if path else ""
        patterns = [inside + pattern for pattern in SAFE_FILES]
        # A whole repository is a student's or a pipeline's: its encoders, of many gigabytes, are not asked for here.
        ignored = None if path else ENCODERS
        found = snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
    folder = Path(found) / path
    if not folder.exists():
        raise UserError(f"{where}: the repository has no such folder, or nothing in it that is safe to load")
    return folder
