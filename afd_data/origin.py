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
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afd_data.errors import UserError
from afd_data.origin_record import (
    ORIGIN,
    WRITER,
    Origin,
    home,
    index_file,
    pinned_url,
    read_origin,
    write_origin,
    writer_of,
)
from afd_data.sample import SPLITS
from afd_data.shards import MANIFEST, SHARD_FILE, read_manifest
from afd_data.storage import Storage, checked_url, open_storage, shown

CARD_FILES = ("README.md", "contact-sheet.png")


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
    """Fetch manifest and index anew where the folder is a head of what others write.  Raises as `local_head` does."""
    origin = read_origin(folder)
    if origin is None or origin.writer:
        return
    with _alone(folder):
        pinned = pinned_url(origin.url)
        part = folder / "head.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            _fetch_head(open_storage(pinned), part)
            (folder / "index").mkdir(exist_ok=True)
            for split in SPLITS:
                if (part / index_file(split)).exists():
                    os.replace(part / index_file(split), folder / index_file(split))
                else:
                    (folder / index_file(split)).unlink(missing_ok=True)
            if pinned != origin.pinned:
                write_origin(folder, Origin(origin.url, pinned))
            os.replace(part / MANIFEST, folder / MANIFEST)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def address(folder: Path, file: str) -> str:
    """Where a tar lies, for messages: its path, or its address at the origin."""
    origin = None if (folder / file).exists() else read_origin(folder)
    return f"{origin.url}/{file}" if origin else str(folder / file)


def is_remote(folder: Path, file: str) -> bool:
    """Whether a tar has to be read from the origin."""
    return not (folder / file).exists() and (folder / ORIGIN).exists()


def read_range(folder: Path, file: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a tar, from the folder or else from its origin; fewer where it ends before.

    Raises OSError where the folder's tar cannot be read, UserError where the origin's cannot.
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
        return open_storage(origin.pinned).read(file, offset, size)
    except FileNotFoundError:
        raise _gone(origin, file) from None


@contextmanager
def whole(folder: Path, file: str) -> Iterator[Path]:
    """Yield the path of a complete tar: the folder's own, or a temporary copy of the origin's with the same last parts.

    Its hash is not compared, and a folder without an origin may lack it.  Raises UserError where the origin's cannot be
    read; one that the block raises about the copy is made to name the original.
    """
    origin = read_origin(folder)
    if origin is None or (folder / file).exists():
        yield folder / file
        return
    assert SHARD_FILE.fullmatch(file), file
    with tempfile.TemporaryDirectory(prefix="afd-") as temporary:
        copy = Path(temporary) / file
        copy.parent.mkdir(parents=True)
        try:
            open_storage(origin.pinned).fetch(file, copy)
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
    there = writer_of(storage)
    if there is None and storage.size(MANIFEST) is None:
        write_origin(folder, origin)  # first: a mark of nobody could not be used again
        with tempfile.TemporaryDirectory() as temporary:
            mark = Path(temporary) / WRITER
            mark.write_text(json.dumps({"writer": origin.writer}))
            _sent(storage, mark, WRITER)
        there = writer_of(storage)
    if there != origin.writer:
        raise UserError(
            f"{url}: another cache lies there, or is being written there. Name an empty place as cache.storage. "
            f"If it is this one's and its folder was lost: read it with stream.folder={url}, or `afd cache pull` it."
        )


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
    for file in (*tars, *map(index_file, SPLITS), *CARD_FILES, MANIFEST):
        if (folder / file).exists():
            put(folder, file)
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


def _fetch_head(storage: Storage, part: Path) -> None:
    """The manifest is read first: an index is never older than the manifest that it was published with."""
    storage.forget()
    try:
        storage.fetch(MANIFEST, part / MANIFEST)
    except FileNotFoundError:
        raise UserError(f"{storage.url}: no cache there (no {MANIFEST}). Look at the address.") from None
    try:
        splits = {shard.split for shard in read_manifest(part).shards}
    except UserError as error:
        raise UserError(str(error).replace(str(part), storage.url)) from None
    (part / "index").mkdir()
    for split in sorted(splits):
        try:
            storage.fetch(index_file(split), part / index_file(split))
        except FileNotFoundError:
            (part / index_file(split)).unlink(missing_ok=True)  # then the tars are read


def _written(folder: Path) -> Storage:
    origin = read_origin(folder)
    assert origin is not None, folder
    assert origin.writer, f"{folder} is a head of what others write"
    return open_storage(origin.url)


def _sent(storage: Storage, path: Path, file: str) -> None:
    try:
        storage.send(path, file)
    except FileNotFoundError as error:
        raise UserError(f"{storage.url}: no such bucket or repository; make it first ({shown(error)})") from None


def _gone(origin: Origin, file: str) -> UserError:
    return UserError(f"{origin.url}/{file}: gone. It may have been pruned; fetch the cache anew, or put the tar back.")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Heads are shared by all processes of a user; one at a time changes them."""
    with open(folder / ".head-lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
