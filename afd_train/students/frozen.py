"""Folders of weights that are used and never trained: which ones they are, and giving their memory back."""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from afd_data.errors import UserError
from afd_data.files import file_sha256

_SHA256 = re.compile(r"[0-9a-f]{64}")


def contents_sha256(folder: Path, patterns: Sequence[str]) -> str:
    """64 hex digits over names and contents of the files in `folder` that match one of the glob patterns.

    The same for a plain copy and for a Hub cache, whose large files are links to blobs named by their SHA-256: those
    are not read.  Raises UserError when a file cannot be read.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    lines = (f"{path.relative_to(folder).as_posix()} {_sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def free_memory() -> None:
    """After the last reference to a network is gone: give its memory back to the system and to other processes."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


def _sha256(path: Path) -> str:
    try:
        real = path.resolve(strict=True)
        if path.is_symlink() and real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
            return real.name
        about = real.stat()
        return _read_once(real, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Copy or download it again.") from None


@lru_cache(maxsize=256)
def _read_once(path: Path, size: int, changed_ns: int) -> str:
    # Size and time are part of the key: another file under the same name is read again.
    return file_sha256(path)
