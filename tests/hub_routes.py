"""The routes of tests/hub_server.py: a request of `huggingface_hub` -> a change of the Hub's state and an answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_server import USERS, Blob, HubError, HubServer, Repo, entry_of, is_lfs

LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown")
DATE = "2025-01-01T00:00:00.000Z"
_REPO = r"(?:(?P<kind>datasets)/)?(?P<name>[\w.-]+/[\w.-]+)"
_API = r"/api/(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)"
_BODY = dict[str, Any]


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes

    def __init__(self, hub: HubServer, *connection: Any):
        self.hub = hub
        super().__init__(*connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet; `HubServer.requests` has it."""

    def do_GET(self) -> None:
        """Any request."""
        self.body = self._read_body()
        split = urlsplit(self.path)
        path, self.query = split.path, {key: values[-1] for key, values in parse_qs(split.query).items()}
        line = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            try:
                for pattern, status in self.hub.fail.items():
                    if re.search(pattern, line):
                        raise HubError(status, "", "told to fail")
                self._route(path)
            except HubError as error:
                headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
                self._send(json.dumps({"error": error.message, **error.body}).encode(), error.status, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self, path: str) -> None:
        for pattern, method in _ROUTES.items():
            command, _, pattern = pattern.partition(" ")
            match = re.fullmatch(pattern, path)
            if match and self.command in command.split("|"):
                found = {key: unquote(value or "") for key, value in match.groupdict().items()}
                reply = method(self, found)
                return self._send(json.dumps(reply).encode()) if reply is not None else None
        raise HubError(404, "", f"no such route: {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(
        self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repo(self, found: dict[str, str], write: bool = False, content: bool = False) -> Repo:
        """The repository of a request, if its user may do that."""
        repo, user = self.hub.repos.get((found.get("kind") or "models", found["name"])), self._user()
        if repo is None or (repo.private and user != repo.owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and user != repo.owner:
            raise HubError(403 if user else 401, "GatedRepo", f"Access to {repo.name} is restricted")
        if write and user != repo.owner:
            raise HubError(403 if user else 401, "", "You don't have write access to this repository")
        return repo

    def create(self, _: dict[str, str]) -> _BODY:
        asked, user = json.loads(self.body), self._user()
        owner, kind = asked["organization"] or user, asked.get("type", "model") + "s"
        name = f"{owner}/{asked['name']}"
        if user is None:
            raise HubError(401, "", "Invalid username or password.")
        if owner != user:
            raise HubError(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.url}/{'' if kind == 'models' else 'datasets/'}{name}"
        if (kind, name) in self.hub.repos:
            raise HubError(409, "", "You already created this repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.repos[kind, name] = repo = Repo(name, private)
        repo.commit({".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
        return {"url": url, "name": name}

    def validate_yaml(self, _: dict[str, str]) -> _BODY:
        match = re.match(r"---\n(.*?\n)---\n", json.loads(self.body)["content"], re.DOTALL)
        head = yaml.safe_load(match[1]) if match else {}
        problem = "" if isinstance(head, dict) else "metadata must be a mapping"
        if not problem and head.get("license", "other") not in LICENCES:
            problem = f'"license" must be one of {", ".join(LICENCES)}'
        if problem:
            raise HubError(400, "", problem, errors=[{"message": problem}], warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, found: dict[str, str]) -> _BODY:
        repo = self._repo(found, write=True)
        tree = repo.commits[repo.sha(found["revision"])]
        return {"files": [self._mode(file, tree) for file in json.loads(self.body)["files"]]}

    def _mode(self, file: _BODY, tree: dict[str, Blob]) -> _BODY:
        path, there = file["path"], tree.get(file["path"])
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False} | ({"oid": there.oid} if there else {})

    def lfs_batch(self, found: dict[str, str]) -> _BODY:
        self._repo(found, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if not (self.hub.folder / item["oid"]).is_file():
                href = f"{self.hub.url}/lfs/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, found: dict[str, str]) -> _BODY:
        if hashlib.sha256(self.body).hexdigest() != found["oid"]:
            raise HubError(400, "", "the content does not have that sha256")
        self.hub.store(self.body, lfs=True)
        return {}

    def lfs_verify(self, found: dict[str, str]) -> _BODY:
        if len(self.hub.content(found["oid"])) != json.loads(self.body)["size"]:
            raise HubError(400, "", "another size than announced")
        return {}

    def commit(self, found: dict[str, str]) -> _BODY:
        repo, branch = self._repo(found, write=True), found["revision"]
        header, *changes = [json.loads(line) for line in self.body.splitlines()]
        if branch not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"no branch {branch}")
        if header["value"].get("parentCommit") not in (None, repo.branches[branch]):
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[repo.branches[branch]])
        for change in changes:
            self._apply(change["key"], change["value"], tree)
        sha = repo.commit(tree, header["value"]["summary"], branch)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{found['name']}/commit/{sha}"}

    def _apply(self, key: str, value: _BODY, tree: dict[str, Blob]) -> None:
        path = value["path"]
        match key:
            case "file":
                tree[path] = self.hub.store(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile":
                tree[path] = self.hub.store(self.hub.content(value["oid"]), lfs=True)
            case "deletedFile" if path in tree:
                del tree[path]
            case "deletedFolder":
                for name in [name for name in tree if name.startswith(path.rstrip("/") + "/")]:
                    del tree[name]
            case _:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")

    def info(self, found: dict[str, str]) -> _BODY:
        repo = self._repo(found)
        sha = repo.sha(found.get("revision") or "main")
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        about = {"id": repo.name, "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False}
        return about | {"author": repo.owner, "tags": [], "downloads": 0, "likes": 0, "lastModified": DATE,
                        "createdAt": DATE, "siblings": siblings, "disabled": False}  # fmt: skip

    def tree(self, found: dict[str, str]) -> list[_BODY]:
        repo, folder = self._repo(found, content=True), found["path"]
        blobs = repo.commits[repo.sha(found["revision"])]
        inside = {path: blob for path, blob in blobs.items() if not folder or path.startswith(folder + "/")}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        deep = self.query.get("recursive") == "true"
        parents = {str(parent) for path in inside for parent in PurePosixPath(path).parents} - {".", folder}
        entries = [entry_of(path, blob) for path, blob in inside.items()]
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in parents]
        here = [entry for entry in entries if deep or str(PurePosixPath(entry["path"]).parent) == (folder or ".")]
        return sorted(here, key=lambda entry: entry["path"])

    def paths_info(self, found: dict[str, str]) -> list[_BODY]:
        repo, wanted = self._repo(found, content=True), parse_qs(self.body.decode())["paths"]
        tree = repo.commits[repo.sha(found["revision"])]
        return [entry_of(path, tree[path]) for path in wanted if path in tree]

    def tag(self, found: dict[str, str]) -> _BODY:
        repo, name = self._repo(found, write=True), json.loads(self.body)["tag"]
        if name in repo.tags:
            raise HubError(409, "", f"tag {name} exists")
        repo.tags[name] = repo.sha(found["revision"])
        return {}

    def refs(self, found: dict[str, str]) -> _BODY:
        repo = self._repo(found)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        return {"converts": []} | {
            kind: [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, (folder, names) in kinds.items()
        }

    def resolve(self, found: dict[str, str]) -> None:
        repo = self._repo(found, content=True)
        sha = repo.sha(found["revision"])
        blob = repo.commits[sha].get(found["path"])
        if blob is None:
            raise HubError(404, "EntryNotFound", f"{found['path']} does not exist")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(blob.size)} if blob.lfs else {}
        data, status = self.hub.content(blob.sha256), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or blob.size - 1), blob.size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
            data, status = data[first : last + 1], 206
        self._send(data, status, headers, self._cut(found["path"], len(data)))

    def _cut(self, path: str, size: int) -> int | None:
        """After how many bytes the connection breaks, if it was told to; each time it is told, once."""
        if self.command == "GET" and self.hub.cut.get(path):
            return min(size, self.hub.cut[path].pop(0))
        return None


_ROUTES = {
    "POST /api/repos/create": HubHandler.create,
    "POST /api/validate-yaml": HubHandler.validate_yaml,
    f"POST {_API}/preupload/(?P<revision>[^/]+)": HubHandler.preupload,
    f"POST {_API}/commit/(?P<revision>[^/]+)": HubHandler.commit,
    f"POST {_API}/tag/(?P<revision>[^/]+)": HubHandler.tag,
    f"GET {_API}/refs": HubHandler.refs,
    f"POST {_API}/paths-info/(?P<revision>[^/]+)": HubHandler.paths_info,
    f"GET {_API}(?:/revision/(?P<revision>[^/]+))?": HubHandler.info,
    f"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": HubHandler.tree,
    f"POST /{_REPO}\\.git/info/lfs/objects/batch": HubHandler.lfs_batch,
    "PUT /lfs/(?P<oid>[0-9a-f]{64})": HubHandler.lfs_put,
    "POST /lfs/(?P<oid>[0-9a-f]{64})/verify": HubHandler.lfs_verify,
    f"GET|HEAD /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": HubHandler.resolve,
}
