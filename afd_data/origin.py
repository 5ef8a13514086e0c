"""Where the tars of a cache lie: in its folder, or at an origin, any address that fsspec knows.

A folder whose tars lie elsewhere is a head: `manifest.json` and `index/` beside `origin.json`, which says where.  Heads
of other people's caches are made below $AFD_HOME (default ~/.cache/afd).  The folder of a cache that is made with
`cache.storage` is one too: it keeps journal, spool, manifest and index, while tars, index, card and manifest go to the
origin.  What was sent is read back and compared, since no other copy stays; the manifest is sent last, so that it never
names what is not there.  Only names that a checked manifest allows are ever fetched.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afd_data.errors import UserError
from afd_data.origin_fetch import fetch_index, fetch_manifest, is_whole, take_over
from afd_data.origin_record import (
    CARD,
    ORIGIN,
    SHEET,
    Origin,
    check_writer,
    claimed,
    home,
    index_file,
    no_place,
    pinned_url,
    read_origin,
    taken,
    write_origin,
    writer_of,
)
from afd_data.sample import SPLITS
from afd_data.shards import MANIFEST, SHARD_FILE, Shard, read_manifest
from afd_data.storage import Storage, checked_url, open_storage


def local_head(source: str) -> Path:
    """A local folder for a path or an address: manifest and index, fetched anew; a path is itself.

    Raises UserError: no cache there, no access, no network, no client for that protocol, a damaged manifest.
    """
    if "://" not in source:
        return Path(source)
    url = checked_url(source)
    name = re.sub(r"[^\w.-]+", "-", url.partition("://")[2]).strip("-.")[-60:]
    folder = home() / "heads" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if read_origin(folder) is None:
            write_origin(folder, Origin(url, url))
    update_head(folder)
    return folder


def update_head(folder: Path) -> None:
    """Fetch manifest and index where the folder is a head of what others write and changed.  Raises as `local_head`."""
    origin = read_origin(folder)
    if origin is None or origin.writer:
        return
    with _alone(folder):
        origin = read_origin(folder) or origin  # another process may have been quicker
        pinned = pinned_url(origin.url)
        if pinned.startswith("hf://") and pinned == origin.pinned and is_whole(folder):
            return
        part = folder / "head.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            storage = open_storage(pinned)
            fetch_manifest(storage, part)
            if not is_whole(folder) or (part / MANIFEST).read_bytes() != (folder / MANIFEST).read_bytes():
                fetch_index(storage, part)
                take_over(part, folder)
            if pinned != origin.pinned:  # last: what a crash leaves is fetched again
                write_origin(folder, Origin(origin.url, pinned))
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def steady(folder: Path) -> Iterator[str | None]:
    """Hold a head as it is: other processes update it after the block.

    Yields the address that its tars are read at now, on the Hub one commit; None for a folder without an origin.  What
    is read later of places that were read in here has to be read at this address (`read_range`).
    """
    origin = read_origin(folder)
    if origin is None or origin.writer:
        yield origin.pinned if origin else None
        return
    with _alone(folder):
        origin = read_origin(folder) or origin
        yield origin.pinned


def address(folder: Path, file: str) -> str:
    """Where a tar lies, for messages: its path, or its address at the origin."""
    origin = None if (folder / file).exists() else read_origin(folder)
    return f"{origin.url}/{file}" if origin else str(folder / file)


def is_remote(folder: Path, file: str) -> bool:
    """Whether a tar has to be read from the origin."""
    return not (folder / file).exists() and (folder / ORIGIN).exists()


def read_range(folder: Path, file: str, offset: int, size: int, pinned: str | None = None) -> bytes:
    """Bytes [offset, offset + size) of a tar, from the folder or else from its origin; fewer where it ends before.

    pinned: the address to read at, where that is not the one of now (`steady`).  Raises OSError where the folder's tar
    cannot be read, UserError where the origin's cannot.
    """
    path, origin = folder / file, read_origin(folder)
    try:
        with open(path, "rb") as opened:
            opened.seek(offset)
            return opened.read(size)
    except FileNotFoundError:
        if origin is None:
            raise
    assert SHARD_FILE.fullmatch(file), file
    try:
        return open_storage(pinned or origin.pinned).read(file, offset, size)
    except FileNotFoundError:
        raise _gone(origin, file) from None


@contextmanager
def whole(folder: Path, shard: Shard) -> Iterator[Path]:
    """Yield the path of a complete tar: the folder's own, or a temporary copy of the origin's with the same last parts.

    Its hash is not compared, and a folder without an origin may lack it.  Raises UserError where the origin's cannot be
    read; one that the block raises about the copy is made to name the original.
    """
    origin, file = read_origin(folder), shard.file
    if origin is None or (folder / file).exists():
        yield folder / file
        return
    assert SHARD_FILE.fullmatch(file), file
    with tempfile.TemporaryDirectory(prefix="afd-") as temporary:
        copy = Path(temporary) / file
        copy.parent.mkdir(parents=True)
        try:
            open_storage(origin.pinned).fetch(file, copy, limit=shard.bytes)
        except FileNotFoundError:
            raise _gone(origin, file) from None
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), f"{origin.url}/{file}")) from None


def set_origin(folder: Path, url: str) -> None:
    """Let the tars of the cache that is made in `folder` lie at `url`, from the first one on.

    Marks the place as this folder's.  Raises UserError: the folder has another origin or tars of its own, another
    cache lies at the place, no access.
    """
    url = checked_url(url)
    known = read_origin(folder)
    if known is not None and (known.url != url or not known.writer):
        raise UserError(f"{folder}: its tars lie at {known.url}, not at {url}. Set cache.storage back to that.")
    if known is None and read_manifest(folder).shards:
        raise UserError(f"{folder}: has sealed shards of its own. Use cache.storage with a new folder.")
    origin = known or Origin(url, url, secrets.token_hex(16))
    storage = open_storage(url)
    if known is None:
        there = writer_of(storage)
        if there is not None or storage.size(MANIFEST) is not None:
            raise taken(storage, there)
        write_origin(folder, origin)  # first: a mark of nobody could not be used again
    if not claimed(storage, origin.writer):
        if known is None:
            (folder / ORIGIN).unlink()
        raise taken(storage, writer_of(storage))


def put(folder: Path, file: str) -> None:
    """Send a file to the origin that the folder writes to, and compare it there, read back.

    Raises UserError: no access, no network, it arrived otherwise.
    """
    _sent(_written(folder), folder / file, file)


def publish(folder: Path) -> None:
    """Send tars, index, card and manifest to the origin that the folder writes to, and drop the tars here.

    Nothing where it writes to none.  The index must be up to date; the next call finishes what a crash left.  Raises as
    `put` does.
    """
    origin = read_origin(folder)
    if origin is None or not origin.writer:
        return
    tars = [shard.file for shard in read_manifest(folder).shards if (folder / shard.file).exists()]
    storage = open_storage(origin.url)
    check_writer(storage, origin.writer)
    for file in (*tars, *map(index_file, SPLITS), CARD, SHEET, MANIFEST):
        if (folder / file).exists():
            put(folder, file)
    check_writer(storage, origin.writer)  # before the only copies here go
    for file in tars:
        (folder / file).unlink()


def remove(folder: Path, file: str) -> None:
    """Remove a pruned tar at the origin that this folder writes to, once the manifest there names it no more."""
    assert SHARD_FILE.fullmatch(file), file
    _written(folder).remove(file)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every tar at the origin, by its name in the cache; {} without an origin."""
    origin = read_origin(folder)
    return open_storage(origin.pinned).sizes("data") if origin else {}


def _written(folder: Path) -> Storage:
    origin = read_origin(folder)
    assert origin is not None, folder
    assert origin.writer, f"{folder} is a head of what others write"
    return open_storage(origin.url)


def _sent(storage: Storage, path: Path, file: str) -> None:
    try:
        storage.send(path, file)
    except FileNotFoundError as error:
        raise no_place(storage, error) from None


def _gone(origin: Origin, file: str) -> UserError:
    return UserError(f"{origin.url}/{file}: gone. It may have been pruned; fetch the cache anew, or put the tar back.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Heads are shared by all processes of a user; one at a time changes them."""
    with open(folder / ".head-lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
