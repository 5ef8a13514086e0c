"""A repository on the Hub that is written to: what lies there, commits that follow one another, tags.

A token never goes into a file that is sent, nor into a message.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError
from afd_data.hub import explained_writing
from afd_data.shards import MANIFEST, Manifest, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

TEXTS = (".json", ".jsonl", ".md", ".yaml", ".txt")


def commit_files(
    repo: str, files: Mapping[str, Path | bytes], managed: Sequence[str], private: bool, message: str
) -> str:
    """Make the model repository `repo` (OWNER/NAME) hold `files` beside what it has; returns its address.

    managed: patterns of names that are taken away where `files` does not have them.  Contents that are there already
    are not sent, and where nothing differs there is no commit.  Raises UserError: no token, a token among the files, no
    such name, no rights, no network, another push at the same time, a public repository although `private`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    token = hub_token()
    check_no_token(files, token)
    with explained_writing(repo, token):
        remote = Repository(repo, "model", private, token)
        stale = [
            path
            for path in remote.files()
            if path not in files and any(fnmatchcase(path, pattern) for pattern in managed)
        ]
        remote.commit(
            [
                *(CommitOperationDelete(path) for path in stale),
                *(CommitOperationAdd(path, content) for path, content in files.items()),
            ],
            message,
        )
    return remote.url


class Repository:
    """A repository that exists, with the commit that the next one has to follow."""

    def __init__(self, repo: str, kind: str, private: bool, token: str) -> None:
        from huggingface_hub import HfApi

        self.token = token
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        self.api = HfApi(token=token, library_name="afd")
        self.repo, self.kind = repo, kind
        self.url = str(self.api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
        info = self.api.repo_info(repo, repo_type=kind)
        if private and not info.private:
            raise UserError(f"{repo}: is there and public; make it private on the Hub first, or leave out --private")
        self.head = info.sha

    def commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        """One commit on what was seen last; none where nothing differs."""
        done = self.api.create_commit(
            self.repo, operations, commit_message=message, repo_type=self.kind, parent_commit=self.head
        )
        self.head = done.oid

    def files(self) -> dict[str, str]:
        """Path -> sha256 of all that is kept in LFS, "" for smaller files."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api.list_repo_tree(self.repo, recursive=True, repo_type=self.kind, revision=self.head)
        return {entry.path: entry.lfs.sha256 if entry.lfs else "" for entry in entries if isinstance(entry, RepoFile)}

    def manifest(self) -> Manifest:
        """The manifest that lies there; an empty one where there is none.  Raises UserError: not one of ours."""
        with tempfile.TemporaryDirectory(prefix="afd-push-") as temporary:
            try:
                self.api.hf_hub_download(
                    self.repo, MANIFEST, repo_type=self.kind, revision=self.head, local_dir=temporary
                )
                return read_manifest(Path(temporary))
            except UserError as error:
                raise UserError(str(error).replace(temporary, self.url)) from None

    def tag(self, name: str) -> None:
        """Tag the state that was pushed, unless the newest tag of this generation shows the same data."""
        refs = self.api.list_repo_refs(self.repo, repo_type=self.kind).tags
        tags = {
            int(found[1] or 1): ref.name for ref in refs if (found := re.fullmatch(rf"{name}(?:-(\d+))?", ref.name))
        }
        last = max(tags, default=0)
        if last and self._manifest_id(tags[last]) == self._manifest_id(self.head):
            return
        new = f"{name}-{last + 1}" if last else name
        self.api.create_tag(self.repo, tag=new, revision=self.head, repo_type=self.kind)

    def _manifest_id(self, revision: str | None) -> str | None:
        found = self.api.get_paths_info(self.repo, [MANIFEST], revision=revision, repo_type=self.kind)
        return getattr(found[0], "blob_id", None) if found else None


def hub_token() -> str:
    """Of the user.  Raises UserError where there is none."""
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise UserError("no token for the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write")
    return token


def check_no_token(files: Mapping[str, Path | bytes], token: str) -> None:
    """Raises UserError naming the first text that has the token in it."""
    for path, content in files.items():
        if Path(path).suffix in TEXTS:
            data = content if isinstance(content, bytes) else content.read_bytes()
            if token.encode() in data:
                raise UserError(f"{path}: has your token for the Hub in it; remove it there. Nothing was sent.")
