"""Caches whose tars lie elsewhere: heads, what is fetched, what is published, and what is said when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import fsspec
import pyarrow.parquet
import pytest

from afd_data.disk_cache import DiskCache
from afd_data.errors import UserError
from afd_data.examples import Reading, read_example, read_places
from afd_data.files import file_sha256
from afd_data.index import index_path, read_index, schema, update_index
from afd_data.inspection import inspect, verify
from afd_data.origin import (
    address,
    local_head,
    publish,
    read_range,
    remove,
    set_origin,
    sizes,
    steady,
    update_head,
    whole,
)
from afd_data.origin_record import MAX_BYTES, ORIGIN, WRITER, Origin, home, read_origin
from afd_data.shards import MANIFEST, Manifest, Shard, read_manifest, write_manifest, write_shard
from afd_data.storage import checked_url, open_storage, shown
from tests.hub_server import HubServer, connect
from tests.unit.test_stream import cache, content

URL = "memory://bucket/cache"
FILE = "data/train/g0000-000000.tar"
NAME = "alice/clips"
HUB = f"hf://datasets/{NAME}"


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples in three tars."""
    return cache(tmp_path_factory.mktemp("origin") / "cache")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def uploaded(sealed: Path) -> Path:
    """The same cache at URL; no head knows of it yet."""
    upload(sealed, URL)
    return sealed


def upload(folder: Path, url: str, names: str = "**/*") -> None:
    files = fsspec.url_to_fs(url)[0]
    for path in folder.glob(names):
        if path.is_file():
            files.pipe_file(f"{url.partition('://')[2]}/{path.relative_to(folder)}", path.read_bytes())


def change(file: str, offset: int, url: str = URL) -> None:
    """Flip one bit at the origin."""
    files, root = fsspec.url_to_fs(url)
    data = bytearray(files.cat_file(f"{root}/{file}"))
    data[offset] ^= 1
    files.pipe_file(f"{root}/{file}", bytes(data))


def examples(folder: Path) -> dict[str, bytes]:
    """Key -> pixels of everything that is read in a cache."""
    reading = Reading(folder, "pyav", None)
    return {key: read_example(reading, place).video.tobytes() for key, place in read_places(folder, "train").items()}


def copies() -> list[Path]:
    return sorted(path for path in (home() / "samples").glob("??/*") if path.is_file())


def first_shard(folder: Path) -> Shard:
    """The one that is FILE."""
    return read_manifest(folder).shards[0]


# Heads


def test_a_path_is_its_own_head(tmp_path: Path) -> None:
    assert local_head(str(tmp_path)) == tmp_path


def test_a_head_holds_manifest_and_index_and_no_tar(uploaded: Path) -> None:
    head = local_head(URL)
    assert read_manifest(head) == read_manifest(uploaded)
    assert read_index(head, "train") == read_index(uploaded, "train")
    assert not list(head.glob("**/*.tar"))


def test_an_address_has_one_head(uploaded: Path) -> None:
    assert local_head(URL) == local_head(f"{URL}/")


def test_samples_are_read_through_a_head_as_they_are_in_the_folder(uploaded: Path) -> None:
    assert examples(local_head(URL)) == examples(uploaded)


def test_a_head_without_an_index_is_read_from_the_tars(sealed: Path) -> None:
    upload(sealed, URL, "manifest.json")
    upload(sealed, URL, "data/**/*")
    assert examples(local_head(URL)) == examples(sealed)


def test_update_head_shows_what_came_since(uploaded: Path, tmp_path: Path) -> None:
    head = local_head(URL)
    larger = cache(tmp_path / "larger", per_shard=1)
    upload(larger, URL)
    assert len(read_manifest(head).shards) == 3
    update_head(head)
    assert len(read_manifest(head).shards) == 7


def test_an_index_that_is_gone_at_the_origin_is_gone_in_the_head(uploaded: Path, tmp_path: Path) -> None:
    head = local_head(URL)
    upload(cache(tmp_path / "larger", per_shard=1), URL)
    fsspec.filesystem("memory").rm_file("/bucket/cache/index/train.parquet")
    update_head(head)
    assert not index_path(head, "train").exists()


def test_an_index_is_fetched_again_only_where_something_changed(uploaded: Path, tmp_path: Path) -> None:
    head = local_head(URL)
    before = index_path(head, "train").stat().st_ino
    update_head(head)
    assert index_path(head, "train").stat().st_ino == before
    index_path(head, "train").unlink()  # as a message about a damaged one asks for
    update_head(head)
    assert read_index(head, "train") == read_index(uploaded, "train")


def test_a_head_that_cannot_be_updated_stays_as_it_was(uploaded: Path) -> None:
    head = local_head(URL)
    before = {path: path.read_bytes() for path in head.rglob("*") if path.is_file()}
    fsspec.filesystem("memory").pipe_file("/bucket/cache/manifest.json", b"{}")
    with pytest.raises(UserError, match=r"memory://bucket/cache/manifest\.json: not a manifest"):
        update_head(head)
    assert {path: path.read_bytes() for path in head.rglob("*") if path.is_file()} == before


def test_a_manifest_of_a_stranger_makes_nobody_fetch_other_names(uploaded: Path) -> None:
    record = json.loads((uploaded / MANIFEST).read_bytes())
    record["shards"][0]["file"] = "../../etc/passwd"
    fsspec.filesystem("memory").pipe_file("/bucket/cache/manifest.json", json.dumps(record).encode())
    with pytest.raises(UserError, match=r"'\.\./\.\./etc/passwd' is not the name of a shard"):
        local_head(URL)


def test_a_place_without_a_cache_is_named() -> None:
    with pytest.raises(UserError, match=r"memory://bucket/cache: no cache there \(no manifest\.json\)"):
        local_head(URL)


def test_several_processes_may_make_a_head_at_once(sealed: Path, tmp_path: Path) -> None:
    code = "import sys; from afd_data.origin import local_head; print(local_head(sys.argv[1]))"
    commands = [
        subprocess.Popen([sys.executable, "-c", code, f"file://{sealed}"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    heads = {command.communicate(timeout=60)[0].strip() for command in commands}
    assert len(heads) == 1
    assert read_manifest(Path(heads.pop())) == read_manifest(sealed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not an address"),
        (b"[]", "not an address"),
        (b'{"url": 1, "pinned": ""}', "url is int"),
        (b'{"url": "/etc", "pinned": "/etc"}', "not an address such as"),
        (b"[" * 60_000, "not an address"),
    ],
)
def test_a_damaged_record_of_the_origin_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / ORIGIN).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_origin(tmp_path)


# Addresses


@pytest.mark.parametrize(
    "source",
    ["s3://key:secret@bucket/x", "s3://bucket/x?token=secret", "s3://bucket/x#secret", "simplecache::s3://bucket/x"],
)
def test_an_address_with_a_login_or_a_query_is_refused_without_repeating_it(source: str) -> None:
    with pytest.raises(UserError) as refused:
        checked_url(source)
    assert "secret" not in str(refused.value)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"s3://\[x/y: not an address"):
        checked_url("s3://[x/y")


def test_a_revision_is_no_login() -> None:
    assert checked_url(f"{HUB}@v1.0/") == f"{HUB}@v1.0"


def test_what_is_shown_of_an_error_has_no_signature() -> None:
    text = "GET https://user:pass@host/a.tar?X-Amz-Signature=abc (try 1)\nfailed"
    assert shown(text) == "GET https://host/a.tar (try 1) failed"


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="needs a protocol whose client is not installed")
def test_a_client_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="pip install gcsfs"):
        local_head("gs://bucket/x")


def test_a_protocol_that_nobody_knows_is_named() -> None:
    with pytest.raises(UserError, match=r"nope://x: no storage that can be opened"):
        local_head("nope://x")


# Reading tars


def test_a_range_is_the_same_here_and_there(uploaded: Path) -> None:
    head, size = local_head(URL), (uploaded / FILE).stat().st_size
    data = (uploaded / FILE).read_bytes()
    for offset, length in ((0, 10), (512, 1000), (size - 5, 5)):
        assert read_range(head, FILE, offset, length) == data[offset : offset + length]
        assert read_range(uploaded, FILE, offset, length) == data[offset : offset + length]


def test_a_range_over_the_end_is_cut_there(uploaded: Path) -> None:
    head, size = local_head(URL), (uploaded / FILE).stat().st_size
    assert len(read_range(head, FILE, size - 5, 100)) == 5


def test_a_whole_tar_is_a_copy_for_as_long_as_it_is_used(uploaded: Path) -> None:
    with whole(local_head(URL), first_shard(uploaded)) as path:
        assert file_sha256(path) == read_manifest(uploaded).shards[0].sha256
        assert path != uploaded / FILE
    assert not path.exists()
    with whole(uploaded, first_shard(uploaded)) as path:
        assert path == uploaded / FILE


def test_a_message_about_a_copy_names_the_original(uploaded: Path) -> None:
    with pytest.raises(UserError, match=rf"^{URL}/{FILE}: odd$"), whole(local_head(URL), first_shard(uploaded)) as path:
        raise UserError(f"{path}: odd")


def test_a_tar_that_is_gone_at_the_origin_is_named(uploaded: Path) -> None:
    head = local_head(URL)
    fsspec.filesystem("memory").rm_file(f"/bucket/cache/{FILE}")
    with pytest.raises(UserError, match=rf"{URL}/{FILE}: gone"):
        read_range(head, FILE, 0, 1)
    with pytest.raises(UserError, match=rf"{URL}/{FILE}: gone"), whole(head, first_shard(uploaded)):
        pass


def test_a_member_that_is_another_at_the_origin_is_refused(uploaded: Path) -> None:
    head = local_head(URL)
    place = next(place for place in read_places(head, "train").values() if place.shard.file == FILE)
    change(FILE, place.mp4[0] + place.mp4[1] // 2)
    message = rf"{URL}/{FILE}: {place.key}\.mp4 is not what was sealed"
    with pytest.raises(UserError, match=message):
        read_example(Reading(head, "pyav", None), place)
    assert not copies()


def test_a_hostile_index_at_the_origin_removes_no_file_of_the_reader(uploaded: Path, tmp_path: Path) -> None:
    victim = tmp_path / "thesis"
    victim.write_text("years of work")
    rows = [row | {"mp4_sha256": str(victim)} for row in read_index(uploaded, "train").to_pylist()]
    part = tmp_path / "index.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema()), part)
    fsspec.filesystem("memory").pipe_file("/bucket/cache/index/train.parquet", part.read_bytes())
    with pytest.raises(UserError, match="a sha256 that is none; remove it"):
        examples(local_head(URL))
    assert victim.read_text() == "years of work"


def test_only_a_hash_names_a_copy(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        DiskCache(tmp_path / "kept", limit_bytes=10).get(str(tmp_path))


@pytest.mark.parametrize("file", [MANIFEST, "index/train.parquet"])
def test_what_is_larger_than_it_may_be_is_not_fetched(
    uploaded: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_BYTES, Path(file).suffix, 100)
    with pytest.raises(UserError, match=rf"{URL}/{file}: has \d+ bytes, at most 100 are fetched"):
        local_head(URL)


def test_a_tar_that_is_larger_than_the_manifest_says_is_not_fetched(uploaded: Path) -> None:
    head, shard = local_head(URL), first_shard(uploaded)
    message = f"at most {shard.bytes - 1} are fetched"
    with pytest.raises(UserError, match=message), whole(head, replace(shard, bytes=shard.bytes - 1)):
        pass


def test_a_head_is_not_updated_while_it_is_held_steady(uploaded: Path, tmp_path: Path) -> None:
    head = local_head(URL)
    upload(cache(tmp_path / "larger", per_shard=1), URL)
    with ThreadPoolExecutor() as pool:
        with steady(head) as pinned:
            update = pool.submit(update_head, head)
            time.sleep(0.2)
            assert len(read_manifest(head).shards) == 3
        update.result(timeout=30)
    assert pinned == URL
    assert len(read_manifest(head).shards) == 7


def test_a_folder_without_an_origin_is_steady(sealed: Path) -> None:
    with steady(sealed) as pinned:
        assert pinned is None


# Copies of samples


def test_a_sample_is_fetched_once(uploaded: Path) -> None:
    head = local_head(URL)
    first = examples(head)
    fsspec.filesystem("memory").rm("/bucket/cache/data", recursive=True)
    assert examples(head) == first


def test_a_damaged_copy_is_fetched_again(uploaded: Path) -> None:
    head = local_head(URL)
    first = examples(head)
    for path in copies():
        path.write_bytes(b"damaged")
    assert examples(head) == first
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in copies())


def test_a_copy_that_vanishes_is_fetched_again(uploaded: Path) -> None:
    head = local_head(URL)
    first = examples(head)
    for path in copies()[::2]:
        path.unlink()
    assert examples(head) == first


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def test_copies_stay_within_the_limit_and_the_longest_unused_go(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, limit_bytes=1000)
    contents = [bytes([number]) * 100 for number in range(40)]
    for number, data in enumerate(contents):
        kept.put(sha(data), data)
        os.utime(tmp_path / sha(data)[:2] / sha(data), (number, number))
        assert kept.get(sha(contents[0])) == contents[0]  # used all the time
        assert stored(tmp_path) <= 1000
    assert kept.get(sha(contents[1])) is None
    assert kept.get(sha(contents[-1])) == contents[-1]


def test_several_processes_stay_within_the_limit_together(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, limit_bytes=10_000) for _ in range(4)]
    for number in range(400):
        data = number.to_bytes(2, "big") * 50
        caches[number % 4].put(sha(data), data)
        assert stored(tmp_path) <= 10_000 + 4 * 200  # two hundredths for each


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    kept = DiskCache(tmp_path, limit_bytes=10)
    kept.put(sha(b"x" * 11), b"x" * 11)
    assert stored(tmp_path) == 0


def test_a_disk_that_takes_no_copies_only_makes_reading_slower(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kept = DiskCache(tmp_path / "file", limit_bytes=1000)
    kept.put(sha(b"x"), b"x")
    assert kept.get(sha(b"x")) is None


def test_an_unfinished_copy_of_a_killed_process_goes(tmp_path: Path) -> None:
    left = tmp_path / "ab" / "abc.1-2.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    DiskCache(tmp_path, limit_bytes=1000).put(sha(b"x"), b"x")
    assert not left.exists()


# Publishing


def writer(folder: Path, url: str = URL) -> Path:
    """A cache that is made in `folder` and lies at `url`, with nothing sealed yet."""
    folder.mkdir(exist_ok=True)
    set_origin(folder, url)
    return folder


def seal(folder: Path, key: str, level: int = 0) -> None:
    manifest = read_manifest(folder)
    shard = write_shard(folder, manifest.next_file("train", 0), [content(folder, key, level)])
    (folder / "clip").unlink()
    write_manifest(folder, manifest.with_shard(shard))
    update_index(folder)


def test_what_is_published_lies_at_the_origin_and_its_tars_there_only(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    seal(folder, "pb-00")
    shards = {shard.file: shard.bytes for shard in read_manifest(folder).shards}
    publish(folder)
    assert sizes(folder) == shards
    assert not list(folder.glob("**/*.tar"))
    assert verify(local_head(URL)) == []
    assert verify(folder) == []
    assert examples(folder).keys() == {"pa-00", "pb-00"}


def test_publishing_again_sends_nothing_that_is_there(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    publish(folder)
    files = fsspec.filesystem("memory")
    before = {path: files.modified(path) for path in files.find("/bucket/cache")}
    publish(folder)
    assert {path: files.modified(path) for path in files.find("/bucket/cache")} == before


def test_a_half_tar_that_a_crash_left_is_sent_again(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    fsspec.filesystem("memory").pipe_file(f"/bucket/cache/{FILE}", (folder / FILE).read_bytes()[:700])
    publish(folder)
    assert verify(local_head(URL)) == []


def test_a_folder_without_an_origin_publishes_nothing(sealed: Path) -> None:
    publish(sealed)
    assert (sealed / FILE).exists()
    assert sizes(sealed) == {}


def test_a_pruned_tar_is_removed_at_the_origin(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    seal(folder, "pb-00")
    publish(folder)
    first, second = read_manifest(folder).shards
    write_manifest(folder, Manifest(0, (second,), (first,)))
    update_index(folder)
    publish(folder)
    remove(folder, first.file)
    remove(folder, first.file)
    assert sizes(folder) == {second.file: second.bytes}
    assert verify(local_head(URL)) == []


def test_update_head_leaves_the_writer_its_own_manifest(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    publish(folder)
    seal(folder, "pb-00")
    update_head(folder)
    assert len(read_manifest(folder).shards) == 2


def test_setting_the_same_origin_again_changes_nothing(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    before = read_origin(folder)
    set_origin(folder, f"{URL}/")
    assert read_origin(folder) == before


def test_a_second_cache_is_refused_at_a_place(tmp_path: Path) -> None:
    writer(tmp_path / "cache")
    with pytest.raises(UserError, match=f"{URL}: another cache lies there"):
        writer(tmp_path / "other")
    assert not (tmp_path / "other" / ORIGIN).exists()


def test_a_place_that_holds_a_copy_of_a_cache_is_refused(uploaded: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{URL}: another cache lies there"):
        writer(tmp_path / "cache")


def test_another_origin_is_refused(tmp_path: Path) -> None:
    writer(tmp_path / "cache")
    with pytest.raises(UserError, match=f"its tars lie at {URL}, not at memory://bucket/other"):
        set_origin(tmp_path / "cache", "memory://bucket/other")


def test_a_cache_with_tars_of_its_own_gets_no_origin(sealed: Path) -> None:
    with pytest.raises(UserError, match="has sealed shards of its own"):
        set_origin(sealed, URL)


def test_a_file_place_is_written_to_as_well(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache", f"file://{tmp_path}/there")
    seal(folder, "pa-00")
    publish(folder)
    assert verify(tmp_path / "there") == []


def test_a_file_place_never_holds_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"file://{tmp_path}/there")
    (tmp_path / "old").write_bytes(b"old" * 100)
    (tmp_path / "new").write_bytes(b"new" * 100)
    storage.send(tmp_path / "old", "file")

    def full(source: IO[bytes], target: IO[bytes]) -> None:
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="No space left"):
        storage.send(tmp_path / "new", "file")
    assert (tmp_path / "there" / "file").read_bytes() == b"old" * 100


def test_of_two_who_mark_a_place_at_once_one_succeeds(tmp_path: Path) -> None:
    def create(text: bytes) -> bool:
        try:
            open_storage(f"file://{tmp_path}/there")._put_new(text, "mark")
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        assert sorted(pool.map(create, [b"a", b"b", b"c"])) == [False, False, True]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mark"]


def test_nothing_is_sent_and_no_tar_dropped_where_another_cache_took_the_place(tmp_path: Path) -> None:
    folder = writer(tmp_path / "cache")
    seal(folder, "pa-00")
    fsspec.filesystem("memory").pipe_file(f"/bucket/cache/{WRITER}", b'{"writer": "another"}')
    with pytest.raises(UserError, match=f"{URL}: another cache lies there"):
        publish(folder)
    assert (folder / FILE).exists()
    assert open_storage(URL).size(FILE) is None


def test_a_damaged_mark_is_named(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/cache/{WRITER}", b'{"wri')
    with pytest.raises(UserError, match=f"{URL}/{WRITER}: damaged. If no other cache is written there, remove it"):
        writer(tmp_path / "cache")


def test_address_says_where_a_tar_lies(uploaded: Path) -> None:
    assert address(uploaded, FILE) == str(uploaded / FILE)
    assert address(local_head(URL), FILE) == f"{URL}/{FILE}"


# Looking at heads


def test_verify_finds_a_flipped_byte_at_the_origin(uploaded: Path) -> None:
    assert verify(local_head(URL)) == []
    change("data/train/g0000-000001.tar", 700)
    problems = verify(local_head(URL))
    assert problems
    assert all(problem.startswith((f"{URL}/data/train/g0000-000001.tar", "index of train")) for problem in problems)


def test_verify_names_a_tar_that_is_gone_at_the_origin(uploaded: Path) -> None:
    fsspec.filesystem("memory").rm_file(f"/bucket/cache/{FILE}")
    assert any(problem.startswith(f"{URL}/{FILE}: gone") for problem in verify(local_head(URL)))


def test_verify_goes_on_when_no_tar_can_be_read(uploaded: Path) -> None:
    fsspec.filesystem("memory").rm("/bucket/cache/data", recursive=True)
    problems = verify(local_head(URL))
    assert sum(f"{URL}/data/train/" in problem for problem in problems) == 3
    assert sum("is in no readable shard" in problem for problem in problems) == 7


def test_verify_reports_a_damaged_journal(sealed: Path) -> None:
    (sealed / "journal.sqlite").write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    try:
        assert any("journal.sqlite" in problem for problem in verify(sealed))
    finally:
        (sealed / "journal.sqlite").unlink()


def test_inspect_reads_a_head_and_draws_its_clips(uploaded: Path, tmp_path: Path) -> None:
    text = inspect(local_head(URL), tmp_path / "sheet.png")
    assert "7 samples, newest generation 0" in text
    assert "teacher playground version 1, licence unknown, distillation unknown: 7" in text
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


# The Hub


def on_hub(hub: HubServer, folder: Path) -> str:
    """Commit a cache to a new or old dataset; the commit."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return hub.add(NAME, files, kind="datasets")


def test_a_dataset_on_the_hub_is_read_at_one_commit(hub: HubServer, sealed: Path, tmp_path: Path) -> None:
    first = on_hub(hub, sealed)
    head = local_head(HUB)
    assert read_origin(head) == Origin(HUB, f"{HUB}@{first}")
    on_hub(hub, cache(tmp_path / "larger", per_shard=1))
    assert examples(head) == examples(sealed)
    update_head(head)
    assert len(read_manifest(head).shards) == 7


def test_a_reader_stays_at_its_commit_when_another_process_updates_the_head(
    hub: HubServer, sealed: Path, tmp_path: Path
) -> None:
    on_hub(hub, sealed)
    head = local_head(HUB)
    with steady(head) as pinned:
        places = read_places(head, "train")
    repository = hub.repos["datasets", NAME]
    tree = repository.commits[repository.branches["main"]]
    repository.commit({path: data for path, data in tree.items() if path != FILE}, "prune")
    update_head(head)
    gone = [place for place in places.values() if place.shard.file == FILE]
    assert len(gone) == 3
    for place in gone:
        with pytest.raises(UserError, match="gone"):
            read_example(Reading(head, "pyav", None), place)
        assert read_example(Reading(head, "pyav", None, pinned=pinned), place).key == place.key


def test_a_commit_that_is_known_is_not_fetched_again(hub: HubServer, sealed: Path) -> None:
    on_hub(hub, sealed)
    head = local_head(HUB)
    hub.requests.clear()
    update_head(head)
    assert len(hub.requests) == 1


def test_a_hub_that_does_not_answer_is_a_message(
    hub: HubServer, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub(hub, sealed)
    head = local_head(HUB)
    connect("http://127.0.0.1:9", tmp_path / "hf", monkeypatch)  # where nobody answers
    with pytest.raises(UserError, match=f"{HUB}: cannot be downloaded"):
        update_head(head)
    assert len(read_places(head, "train")) == 7


def test_a_name_that_the_hub_does_not_take_is_a_message() -> None:
    with pytest.raises(UserError, match=r"hf://datasets/a\.\.b/c: .*a\.\.b"):
        local_head("hf://datasets/a..b/c")


def test_a_sample_of_the_hub_is_one_request_of_its_size(hub: HubServer, sealed: Path) -> None:
    on_hub(hub, sealed)
    head = local_head(HUB)
    place = next(iter(read_places(head, "train").values()))
    read_range(head, FILE, 0, 1)  # what the client wants to know of a tar, it asks once
    hub.requests.clear()
    read_example(Reading(head, "pyav", None), place)
    assert [line.split("/")[0] for line in hub.requests] == ["GET "]


def test_a_dataset_that_is_not_there_is_named(hub: HubServer) -> None:
    with pytest.raises(UserError, match=f"{HUB}: no such repository, or no access"):
        local_head(HUB)


def test_a_revision_that_is_not_there_is_named(hub: HubServer, sealed: Path) -> None:
    on_hub(hub, sealed)
    with pytest.raises(UserError, match="no branch, tag or commit 'v9'"):
        local_head(f"{HUB}@v9")


def test_an_address_of_a_model_is_refused() -> None:
    with pytest.raises(UserError, match="not hf://datasets/OWNER/NAME"):
        local_head("hf://alice/clips")


def test_a_read_that_fails_for_a_moment_is_tried_again() -> None:
    storage, calls = open_storage(URL), []

    def flaky() -> bytes:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset by peer")
        return b"data"

    assert storage._tried(flaky, pauses=(0.0, 0.0)) == b"data"


def test_a_head_of_what_others_write_publishes_nothing(uploaded: Path) -> None:
    head = local_head(URL)
    files = fsspec.filesystem("memory")
    before = {path: files.modified(path) for path in files.find("/bucket/cache")}
    publish(head)
    assert {path: files.modified(path) for path in files.find("/bucket/cache")} == before
