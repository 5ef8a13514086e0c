"""A small Hugging Face Hub on this machine: what the real `huggingface_hub` client asks, answered over real HTTP.

Models and datasets: create, preupload, Git LFS uploads (checked by sha256), commits, trees, branches and tags,
downloads with ranges, private and gated repositories, and the Hub's error codes.  Xet is not spoken: the client must
have it disabled.  Contents lie as files in a folder, named by their sha256; everything else is in memory.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

USERS = {"hf_token_of_alice": "alice", "hf_token_of_bob": "bob"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".mp4", ".tar", ".parquet")
LFS_BYTES = 10_000_000  # anything larger is no regular file


class HubError(Exception):
    """An answer other than 200: status, `X-Error-Code`, `X-Error-Message`."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any):
        self.status, self.code, self.message, self.body = status, code, message or code, body


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its content's names in LFS (sha256) and in git (sha1), and how it was committed."""

    sha256: str
    git: str
    size: int
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub calls its ETag."""
        return self.sha256 if self.lfs else self.git


@dataclass
class Repo:
    """Commits (sha -> path -> blob) and names for some of them (branches and tags)."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def commit(self, tree: dict[str, Blob], title: str, branch: str = "main") -> str:
        text = f"{self.name} {len(self.commits)} {title} {sorted(tree.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = tree, title, sha
        return sha

    def sha(self, revision: str) -> str:
        """Of a branch, a tag or a commit.  Raises HubError."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class HubServer:
    """The Hub's state; `serving` answers for it at `url`.

    `requests` are the answered ones as "METHOD PATH"; `fail` maps a regular expression of such lines to the status that
    they are answered with instead; `cut` maps a path to the numbers of bytes after which its next downloads break off.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock, self.url = folder, threading.RLock(), ""
        self.clear()

    def clear(self) -> None:
        """Forget all repositories and requests; stored contents too."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.fail: dict[str, int] = {}
        self.cut: dict[str, list[int]] = {}
        for path in self.folder.iterdir():
            path.unlink()

    def add(
        self, name: str, files: dict[str, bytes], kind: str = "models", private: bool = False, gated: bool = False
    ) -> str:
        """Commit files without a client, on a new repository where there is none; returns the commit."""
        repo = self.repos.setdefault((kind, name), Repo(name, private, gated))
        tree = dict(repo.commits[repo.branches["main"]]) if repo.commits else {}
        return repo.commit(tree | {path: self.store(data, is_lfs(path, len(data))) for path, data in files.items()}, "")

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Path -> content of a revision."""
        repo = self.repos[kind, name]
        return {path: self.content(blob.sha256) for path, blob in repo.commits[repo.sha(revision)].items()}

    def store(self, data: bytes, lfs: bool) -> Blob:
        """Keep a content."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        return Blob(sha256, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data), lfs)

    def content(self, sha256: str) -> bytes:
        """A content that was stored.  Raises HubError."""
        path = self.folder / sha256
        if not path.is_file():
            raise HubError(404, "", f"LFS object {sha256} was never uploaded")
        return path.read_bytes()


def is_lfs(path: str, size: int) -> bool:
    """What the Hub would keep in LFS."""
    return size > LFS_BYTES or PurePosixPath(path).suffix in LFS_SUFFIXES


def entry_of(path: str, blob: Blob) -> dict[str, Any]:
    """A file as a tree names it."""
    lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
    return {"type": "file", "oid": blob.git, "size": blob.size, "path": path, **lfs}


@contextmanager
def serving(folder: Path) -> Iterator[HubServer]:
    """A Hub that keeps its contents in `folder`, answered for by threads of this process."""
    from tests.hub_routes import HubHandler

    hub = HubServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *connection: HubHandler(hub, *connection))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(url: str, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = "hf_token_of_alice") -> None:
    """Make `huggingface_hub` in this process and its children talk to `url`, with an empty cache in `home`.

    The client reads most of its settings once, when it is imported, so those are set as well.
    """
    from huggingface_hub import HfFileSystem, constants, hf_api

    from afd_data.storage import open_storage

    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(key, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    read_once = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
                 "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
                 "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"), "HF_HUB_DISABLE_XET": True,
                 "HF_HUB_OFFLINE": False}  # fmt: skip
    for name, value in read_once.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()  # they remember endpoint and login
    open_storage.cache_clear()
