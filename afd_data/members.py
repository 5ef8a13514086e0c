"""A sealed member by its row of the index, which a stranger may have written: its place checked, its hash compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.origin import address, read_range
from afd_data.sample import SHA256
from afd_data.shards import MAX_BYTES


def read_member_at(folder: Path, row: Mapping[str, Any], kind: str) -> bytes:
    """The bytes of a member (mp4 or json) of the sample that a row of the index describes.

    Raises UserError: the row points elsewhere, the tar is gone or truncated, the member is not what was sealed.
    """
    where = address(folder, row["shard"])
    offset, size = span(row, kind, where)
    try:
        data = read_range(folder, row["shard"], offset, size)
    except OSError as error:
        raise unreadable(where, error) from None
    check_member(data, size, row[f"{kind}_sha256"], where, f"{row['key']}.{kind}")
    return data


def span(row: Mapping[str, Any], kind: str, where: str, limit: int = max(MAX_BYTES.values())) -> tuple[int, int]:
    """(offset, size) in bytes of a member in a tar of `limit` bytes.  Raises UserError: not a row that afd wrote."""
    offset, size = row[f"{kind}_offset"], row[f"{kind}_size"]
    if offset < 0 or not 0 <= size <= min(MAX_BYTES[kind], limit):
        raise UserError(f"{where}: the index puts {row['key']}.{kind} at {offset} with {size} bytes; remove it")
    if SHA256.fullmatch(row[f"{kind}_sha256"]) is None:
        raise UserError(f"{where}: the index gives {row['key']}.{kind} a sha256 that is none; remove it")
    return offset, size


def check_member(data: bytes, size: int, sha256: str, where: str, name: str) -> None:
    """Raises UserError when the bytes that were read in the tar `where` are not those of the member `name`."""
    if len(data) < size:
        raise UserError(f"{where}: truncated in {name}, or the index is wrong. Copy the shard again.")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{where}: {name} is not what was sealed (its hash differs). Copy the shard again.")


def unreadable(where: str, error: OSError) -> UserError:
    """What to say of a tar that cannot be read."""
    return UserError(f"{where}: cannot be read ({error.strerror}). Restore it, or cache into a new folder.")
