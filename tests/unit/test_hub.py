"""Hub addresses, asked of a Hub on this machine through the real client."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd_data.errors import UserError
from afd_train.hub import local_path
from tests.hub_server import HubServer, connect

FILES = {
    "student.json": b"{}",
    "transformer/config.json": b'{"a": 1}',
    "transformer/diffusion_pytorch_model.safetensors": b"weights",
    "checkpoints/x.pt": b"pickle",
    "vae/config.json": b"{}",
}
EVIL = {
    "evil.py": b"import os",
    "weights.bin": b"pickle",
    "model.pkl": b"pickle",
    "transformer/custom.py": b"import os",
}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_path_of_this_machine_stays_as_it_is(tmp_path):
    assert local_path(tmp_path / "x", "student.init") == tmp_path / "x"


def test_a_file_is_downloaded(hub):
    hub.add("alice/model", FILES)
    assert local_path("hf://alice/model/checkpoints/x.pt", "student.init").read_bytes() == b"pickle"


def test_a_folder_holds_its_own_files_only(hub):
    hub.add("alice/model", FILES)
    folder = local_path("hf://alice/model/transformer", "student.init")
    assert names(folder) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not (folder.parent / "vae").exists()


def test_neither_code_nor_pickles_nor_encoders_are_fetched_with_a_repository(hub):
    hub.add("alice/model", FILES | EVIL)
    folder = local_path("hf://alice/model", "student.init")
    assert names(folder) == FILES.keys() - {"checkpoints/x.pt", "vae/config.json"}
    assert not [line for line in hub.requests if any(name in line for name in EVIL)]


def test_a_revision_is_the_repository_at_that_time(hub):
    first = hub.add("alice/model", {"student.json": b"old"})
    hub.add("alice/model", {"student.json": b"new"})
    hub.repos["models", "alice/model"].tags["v1"] = first
    for revision in ("v1", first):
        assert (local_path(f"hf://alice/model@{revision}", "x") / "student.json").read_bytes() == b"old"
    assert (local_path("hf://alice/model", "x") / "student.json").read_bytes() == b"new"


def test_what_was_downloaded_is_used_when_the_hub_is_away(hub):
    hub.add("alice/model", FILES)
    folder = local_path("hf://alice/model/transformer", "x")
    hub.fail[".*"] = 503
    assert local_path("hf://alice/model/transformer", "x") == folder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://alice/missing", "x: hf://alice/missing: no such repository, or no access"),
        ("hf://alice/missing/a.pt", "no such repository, or no access"),
        ("hf://alice/model/missing.pt", "the repository has no such file"),
        ("hf://alice/model/missing", "the repository has no such folder, or nothing in it that is safe"),
        ("hf://alice/model/code", "the repository has no such folder, or nothing in it that is safe"),
        ("hf://alice/model@v9", "the repository has no branch, tag or commit 'v9'"),
        ("hf://alice/model@v9/checkpoints/x.pt", "the repository has no branch, tag or commit 'v9'"),
        ("hf://bob/secret", "no such repository, or no access"),
        ("hf://bob/gated", "gated; accept its terms on the Hub"),
        ("hf://bob/gated/student.json", "gated; accept its terms on the Hub"),
        ("hf://alice", "is not hf://OWNER/REPO[@REVISION][/PATH]"),
        ("hf://alice/model/../../etc", "is not hf://OWNER/REPO[@REVISION][/PATH]"),
        ("hf://-alice/model", "-alice"),
    ],
)
def test_what_is_not_there_is_said(hub, source, message):
    hub.add("alice/model", FILES | {"code/run.py": b""})
    hub.add("bob/secret", FILES, private=True)
    hub.add("bob/gated", FILES, gated=True)
    with pytest.raises(UserError) as error:
        local_path(source, "x")
    assert message in str(error.value)


def test_a_private_repository_is_its_owners(hub):
    hub.add("alice/model", FILES, private=True)
    assert names(local_path("hf://alice/model/vae", "x")) == {"config.json"}


def test_a_hub_that_does_not_answer_is_said(tmp_path, monkeypatch):
    connect("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(UserError, match="the Hub cannot be reached") as error:
        local_path("hf://alice/model", "student.init")
    assert "hf_token_of_alice" not in str(error.value)


def test_a_damaged_upload_is_refused(hub: HubServer):
    """Of the server itself: what it keeps has the sha256 that was announced."""
    import huggingface_hub

    session = huggingface_hub.utils.get_session()
    assert session.put(f"{hub.url}/lfs/{'0' * 64}", content=b"other").status_code == 400
    assert list(hub.folder.iterdir()) == []
