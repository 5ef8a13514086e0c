"""Leases: what live runs read stays, what ended does not count, and a stranger's file counts for nothing."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import pytest

from afd_data import leases
from afd_data.errors import UserError
from afd_data.leases import KEPT_S, RENEW_AT_ORIGIN_S, RENEW_S, Lease, live_generations
from afd_data.origin import local_head, publish, set_origin
from afd_data.origin_record import ORIGIN
from afd_data.shards import Manifest, write_manifest


def about(lease: Lease) -> dict:
    return json.loads(lease.path.read_text())


def test_all_live_leases_together_say_what_must_stay(tmp_path: Path) -> None:
    first, second = Lease(tmp_path, 1, "a/train"), Lease(tmp_path, 3, "b/train")
    assert live_generations(tmp_path) == {1, 3}
    second.hold({3, 4})
    assert live_generations(tmp_path) == {1, 3, 4}
    first.release()
    assert live_generations(tmp_path) == {3, 4}
    second.release()
    assert live_generations(tmp_path) == set()


def test_a_folder_without_leases_holds_nothing(tmp_path: Path) -> None:
    assert live_generations(tmp_path / "nowhere") == set()


def test_a_lease_that_nobody_renews_lasts_for_the_documented_time(tmp_path: Path) -> None:
    renewed = about(Lease(tmp_path, 2, "a/train"))["renewed_at"]
    assert live_generations(tmp_path, now=renewed + KEPT_S - 1) == {2}
    assert live_generations(tmp_path, now=renewed + KEPT_S + 1) == set()


def test_a_run_that_is_resumed_takes_its_own_lease_again(tmp_path: Path) -> None:
    Lease(tmp_path, 2, "/somewhere/a/train")
    Lease(tmp_path, 3, "/somewhere/a/train")
    assert live_generations(tmp_path) == {3}


def test_runs_of_one_name_in_two_places_have_two_leases(tmp_path: Path) -> None:
    first, _ = Lease(tmp_path, 2, "/here/a/train"), Lease(tmp_path, 3, "/there/a/train")
    first.release()
    assert live_generations(tmp_path) == {3}


def test_no_path_of_the_machine_is_written_down(tmp_path: Path) -> None:
    lease = Lease(tmp_path, 2, "/secret/home/run/train")
    assert about(lease)["holder"] == "run/train"
    assert "secret" not in lease.path.read_text()


def test_renewing_writes_no_more_often_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(tmp_path, 2, "a/train")
    before = lease.path.stat().st_ino
    lease.renew()
    assert lease.path.stat().st_ino == before
    start = time.monotonic()
    monkeypatch.setattr(leases.time, "monotonic", lambda: start + RENEW_S + 1)
    lease.renew()
    assert lease.path.stat().st_ino != before


def test_a_cache_that_cannot_be_written_needs_no_lease(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "leases").write_text("in the way")
    lease = Lease(tmp_path, 2, "a/train")
    lease.hold({3})
    lease.release()
    assert [record.getMessage().split(": ")[1][:21] for record in caplog.records] == ["no lease can be kept "]


def test_a_lease_that_cannot_be_read_lets_nothing_be_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lease(tmp_path, 2, "a/train")

    def stale(_: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UserError, match=r"\.json: a lease that cannot be read \(Stale file handle\)"):
        live_generations(tmp_path)


# At an origin


@pytest.fixture
def owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache whose tars lie in `tmp_path`/there."""
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    folder = tmp_path / "owner"
    folder.mkdir()
    set_origin(folder, f"file://{tmp_path}/there")
    write_manifest(folder, Manifest())
    publish(folder)
    return folder


def test_the_owner_sees_what_is_read_at_the_address(owner: Path, tmp_path: Path) -> None:
    head = local_head(f"file://{tmp_path}/there")
    lease = Lease(head, 3, "a/train", earlier=[1])
    assert live_generations(owner) == live_generations(head) == {1, 3}
    lease.hold({4})
    assert live_generations(owner) == {4}
    lease.release()
    assert live_generations(owner) == live_generations(head) == set()
    assert not list((tmp_path / "there" / "leases").iterdir())


def test_a_lease_is_renewed_at_the_address_too(owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(local_head(f"file://{tmp_path}/there"), 3, "a/train")
    there = tmp_path / "there" / "leases" / lease.path.name
    before = there.stat().st_ino
    lease.renew()
    assert there.stat().st_ino == before
    start = time.monotonic()
    monkeypatch.setattr(leases.time, "monotonic", lambda: start + RENEW_AT_ORIGIN_S + 1)
    lease.renew()
    assert there.read_bytes() == lease.path.read_bytes()
    assert there.stat().st_ino != before


def test_an_address_that_takes_no_lease_is_said_once(
    owner: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "there" / "leases").write_text("in the way")
    lease = Lease(local_head(f"file://{tmp_path}/there"), 3, "a/train")
    lease.hold({4})
    lease.release()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "no lease can be kept there" in caplog.text


def test_an_address_that_does_not_answer_lets_nothing_be_pruned(owner: Path, tmp_path: Path) -> None:
    (owner / ORIGIN).write_text(json.dumps({"url": "s3://x/y", "pinned": "s3://x/y", "writer": "w"}))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(UserError, match="s3://x/y: no access"):
            live_generations(owner)


GOOD = {"generations": [5], "holder": "a/train", "host": "h", "pid": 1, "renewed_at": 1000.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"generations": [5], "renewed',
        "[]",
        "null",
        "[" * 10**5,
        "\x00\xff",
        json.dumps(GOOD | {"generations": 5}),
        json.dumps(GOOD | {"generations": ["5"]}),
        json.dumps(GOOD | {"generations": [True]}),
        json.dumps(GOOD | {"generations": [-1]}),
        json.dumps(GOOD | {"shards": [5]}),
        json.dumps(GOOD | {"renewed_at": "1000"}),
        json.dumps(GOOD | {"renewed_at": float("nan")}),
        json.dumps(GOOD | {"renewed_at": 1e300}),
        json.dumps(GOOD | {"holder": "x" * 2**25}),
    ],
)
def test_what_is_no_lease_counts_for_nothing(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "leases"
    folder.mkdir()
    (folder / "bad.json").write_text(content, encoding="latin-1")
    (folder / "folder.json").mkdir()
    (folder / "outside").write_text(json.dumps(GOOD | {"generations": [7]}))
    (folder / "link.json").symlink_to(folder / "outside")
    (folder / "good.json").write_text(json.dumps(GOOD | {"generations": [6]}))
    assert live_generations(tmp_path, now=1001.0) == {6}
