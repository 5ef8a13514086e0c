"""A place at an fsspec address (s3://, gs://, hf://, file:// ...) whose files are read, fetched, sent and removed.

Credentials are those that the protocol's own client finds in the environment; an address that carries any is refused,
since addresses are written down.  What a client raises becomes a UserError that names the address and what to do.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast
from urllib.parse import urlsplit

from afd_data.errors import UserError
from afd_data.files import atomic_write, file_sha256, fsync

if TYPE_CHECKING:
    import fsspec

PAUSES_S = (0.5, 1.0, 2.0)  # before a read is tried again
LASTING = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ValueError)
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
CHUNK = 8 * 2**20  # bytes read at once when a copy is compared
T = TypeVar("T")
_QUERY = re.compile(r"(\w://[^\s?#]*)[?#][^\s'\")]*")


def checked_url(source: str) -> str:
    """The address without its last slash.

    Raises UserError: not PROTOCOL://PLACE, or it carries a login, a query or a fragment.
    """
    try:
        parts = urlsplit(source)
    except ValueError as error:
        raise UserError(f"{shown(source)}: not an address ({error})") from None
    if "::" in source or not re.fullmatch(r"[a-z][a-z0-9+]*", parts.scheme) or not (parts.netloc or parts.path):
        raise UserError(f"{shown(source)}: not an address such as s3://BUCKET/NAME or hf://datasets/OWNER/NAME")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{shown(source)}: an address with a login or a query is written down nowhere. Leave that away and put "
            "credentials into the environment variables that the storage's own client reads."
        )
    return source.rstrip("/")


def shown(text: object) -> str:
    """One short line without the queries and logins of addresses."""
    line = _QUERY.sub(r"\1", " ".join(str(text).split()))
    return re.sub(r"://[^/\s]*@", "://", line)[:300]


@lru_cache(maxsize=64)
def open_storage(url: str) -> Storage:
    """The place at a checked address; nothing is asked yet.  Raises UserError: no client for that protocol."""
    return Storage(url)


class Storage:
    """Files by their names below one address.

    Every method raises FileNotFoundError where the place has no such file (or the bucket is none), and UserError for
    all else that goes wrong; reads are tried a few times.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = _opened(url)
        self._local = url.startswith(("file://", "local://"))  # the others have no folders, and no half files

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; fewer where it ends before."""
        # Clients that read ahead would fetch megabytes more than is asked for.
        plain = {} if self._fs.async_impl else {"cache_type": "none"}
        return self._tried(
            lambda: cast(bytes, self._fs.cat_file(self._path(file), start=offset, end=offset + size, **plain))
        )

    def fetch(self, file: str, target: Path, limit: int) -> None:
        """Copy a file of at most `limit` bytes to a local path, which is not whole until this returns."""

        def copy() -> None:
            size = self._fs.size(self._path(file))
            if size is None or size > limit:
                raise UserError(f"{self.url}/{file}: has {size} bytes, at most {limit} are fetched")
            self._fs.get_file(self._path(file), str(target))
            if target.stat().st_size != size:
                raise OSError(f"{target.stat().st_size} of {size} bytes arrived")

        self._tried(copy)

    def send(self, source: Path, file: str) -> None:
        """Upload a local file and compare what lies there afterwards, read back, with its sha256; a same one stays.

        Not tried again here: the clients do that for what is safe to repeat.
        """
        wanted = file_sha256(source)
        if self.size(file) == source.stat().st_size and self.sha256(file) == wanted:
            return
        self._tried(lambda: self._put(source, file), pauses=())
        if self.sha256(file) != wanted:
            raise UserError(f"{self.url}/{file}: arrived otherwise than it was sent. Run the same command again.")

    def create(self, file: str, data: bytes) -> None:
        """Write a small new file; of several who do so at once one succeeds where the place can tell them apart.

        Raises FileExistsError.
        """
        if self.size(file) is not None:
            raise FileExistsError(file)
        self._tried(lambda: self._put_new(data, file), pauses=())
        self.forget()

    def remove(self, file: str) -> None:
        """Remove a file; one that is not there is no error."""
        if self.size(file) is not None:
            self._tried(lambda: self._fs.rm_file(self._path(file)), pauses=())
            self.forget()

    def size(self, file: str) -> int | None:
        """Of a file in bytes; None where there is none."""
        self.forget()
        try:
            return self._tried(lambda: self._fs.info(self._path(file)))["size"]
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder, by name; {} where there is no such folder."""
        self.forget()
        try:
            found = cast(dict, self._tried(lambda: self._fs.find(self._path(folder), detail=True)))
        except FileNotFoundError:
            return {}
        return {path[len(self._root) + 1 :]: info["size"] for path, info in found.items()}

    def sha256(self, file: str) -> str:
        """Of a file as it lies there: 64 hex digits."""

        def digest() -> str:
            total = hashlib.sha256()
            with self._fs.open(self._path(file), "rb") as opened:
                while data := opened.read(CHUNK):
                    total.update(cast(bytes, data))
            return total.hexdigest()

        return self._tried(digest)

    def forget(self) -> None:
        """Drop what the client remembers about which files there are."""
        self._fs.invalidate_cache()

    def _put(self, source: Path, file: str) -> None:
        if self._local:
            with atomic_write(self._made(file)) as target, open(source, "rb") as opened:
                shutil.copyfileobj(opened, target)
        else:
            self._fs.put_file(str(source), self._path(file))
        self.forget()

    def _put_new(self, data: bytes, file: str) -> None:
        if not self._local:
            self._fs.pipe_file(self._path(file), data, mode="create")
            return
        target = self._made(file)
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        try:
            part.write_bytes(data)
            fsync(part)
            os.link(part, target)  # fails where there is one
        finally:
            part.unlink(missing_ok=True)

    def _made(self, file: str) -> Path:
        """The path of a file of a local place, in a folder that exists."""
        path = Path(self._path(file))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def _tried(self, call: Callable[[], T], pauses: tuple[float, ...] = PAUSES_S) -> T:
        for pause in (*pauses, None):
            try:
                return call()
            except (FileNotFoundError, FileExistsError, UserError):
                raise
            except Exception as error:  # each client has errors of its own, with no ancestor in common
                lasting = isinstance(error, LASTING) or type(error).__name__ in NO_CREDENTIALS
                if lasting or pause is None:
                    raise UserError(_explained(self.url, error)) from None
                time.sleep(pause)
        raise AssertionError


def _opened(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        fs, root = fsspec.url_to_fs(url)
    except ImportError:
        package = known_implementations[protocol]["class"].partition(".")[0]
        raise UserError(f"{url}: the client for {protocol}:// is not installed. Run `pip install {package}`.") from None
    except ValueError as error:
        raise UserError(f"{url}: no storage that can be opened ({shown(error)})") from None
    return fs, root.rstrip("/")


def _explained(url: str, error: Exception) -> str:
    what = f"{type(error).__name__}: {shown(error)}"
    if isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS:
        return (
            f"{url}: no access ({what}). Put credentials with the right to it where the storage's client looks: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (s3), GOOGLE_APPLICATION_CREDENTIALS (gs), HF_TOKEN (hf)."
        )
    return f"{url}: the storage does not answer as it should ({what}). Look at the address and the network."
