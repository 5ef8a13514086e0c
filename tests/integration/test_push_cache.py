"""A cache to a Hub on this machine and back, with the real clients: huggingface_hub, datasets, webdataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from afd_data import hub_push
from afd_data.card import write_card
from afd_data.config import StreamConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.examples import read_places
from afd_data.files import one_writer
from afd_data.hub_pull import pull
from afd_data.hub_push import push
from afd_data.index import read_index, shard_rows, update_index
from afd_data.inspection import inspect, verify
from afd_data.journal import LOCK
from afd_data.leases import Lease
from afd_data.origin import local_head
from afd_data.sample import Sample
from afd_data.shards import (
    Content,
    Manifest,
    describe_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from afd_data.stream import Stream
from afd_data.video import write_mp4
from tests.hub_server import HubServer, connect

REPO = "alice/clips"
SOURCE = f"hf://datasets/{REPO}"
VIDEO = VideoConfig(width=16, height=16, frames=4, fps=8.0, lossless=True)
DAY0 = 1.7e9  # seconds since 1970: 2023-11-14
Change = Callable[[Sample], Sample]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Sample, bytes]]]:
    """Split -> (record, mp4): 12 of train and 4 of validation, a square of another grey in each."""
    path, found = tmp_path_factory.mktemp("clips") / "a.mp4", {}
    for split, count in (("train", 12), ("validation", 4)):
        found[split] = []
        for number in range(count):
            frames = np.zeros((4, 16, 16, 3), np.uint8)
            frames[:, 4:12, 4:12] = 40 + 10 * number
            write_mp4(path, frames, VIDEO)
            mp4 = path.read_bytes()
            found[split].append((record(split, number, hashlib.sha256(mp4).hexdigest()), mp4))
    return found


def record(split: str, number: int, sha256: str) -> Sample:
    """Prompt number n has n + 3 words."""
    prompt_id = f"{split[0]}{number:02d}"
    return Sample(
        schema_version=1,
        key=f"{prompt_id}-00",
        prompt_id=prompt_id,
        prompt=f"a grey{' very' * number} square",
        split=split,
        take=0,
        generation=0,
        fingerprint=hashlib.sha256(prompt_id.encode()).hexdigest(),
        seed=number,
        teacher="drawn",
        teacher_version="1",
        requested_json='{"settings": {"edge": 8}}',
        effective_json="{}",
        provenance_json="{}",
        world_json="{}",
        licence="CC0-1.0",
        distillation="allowed",
        cost=0.0,
        currency="USD",
        width=16,
        height=16,
        frames=4,
        fps=8.0,
        duration_s=0.5,
        video_sha256=sha256,
        perceptual_hash="0" * 16,
    )


@pytest.fixture
def seal(clips: dict[str, list[tuple[Sample, bytes]]], tmp_path: Path) -> Callable[..., Path]:
    """`seal("train", 0, range(8), complete=True, change=...)`: those clips, in shards of four, in the test's cache."""

    def run(
        split: str,
        generation: int,
        which: range,
        complete: bool = True,
        change: Change = lambda sample: sample,
        folder: Path = tmp_path / "cache",
    ) -> Path:
        manifest = read_manifest(folder)
        for start in range(which.start, which.stop, 4):
            mine = [(change(replace(sample, generation=generation)), mp4) for sample, mp4 in clips[split]]
            contents = [
                Content(sample.key, DAY0 + generation * 86400, mp4, sample.to_json())
                for sample, mp4 in mine[start : min(start + 4, which.stop)]
            ]
            manifest = manifest.with_shard(write_shard(folder, manifest.next_file(split, generation), contents))
        write_manifest(folder, replace(manifest, generation=generation) if complete else manifest)
        update_index(folder)
        return folder

    return run


@pytest.fixture
def cache(seal: Callable[..., Path]) -> Path:
    """Generation 0: two shards of train, one of validation."""
    seal("train", 0, range(8))
    return seal("validation", 0, range(4))


def on_hub(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    return hub.files(REPO, revision, kind="datasets")


def tars(files: Any) -> list[str]:
    return sorted(str(name) for name in files if str(name).endswith(".tar"))


def uploads(hub: HubServer) -> int:
    """Contents sent to LFS."""
    return sum(line.startswith("PUT /lfs/") for line in hub.requests)


def head(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def paths(card: bytes) -> dict[str, list[str]]:
    return {entry["split"]: entry["path"] for entry in head(card)["configs"][0]["data_files"]}


def members(folder: Path) -> set[tuple[str, int, str, str]]:
    return {
        (row["key"], row["generation"], row["mp4_sha256"], row["json_sha256"])
        for shard in read_manifest(folder).shards
        for row in shard_rows(folder, shard)
    }


# Push


def test_a_pushed_cache_has_its_data_and_nothing_else(hub, cache):
    for name in ("journal.sqlite", ".lock", "spool/a.mp4", "leases/x.json", "parts/0000-of-0002/manifest.json",
                 "text/a.safetensors", "latents/a.safetensors"):  # fmt: skip
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"private")
    assert push(cache, REPO, progress=False) == f"{hub.url}/datasets/{REPO}"
    assert set(on_hub(hub)) == {
        ".gitattributes", "README.md", "contact-sheet.png", "manifest.json", "index/train.parquet",
        "index/validation.parquet", "data/train/g0000-000000.tar", "data/train/g0000-000001.tar",
        "data/validation/g0000-000000.tar"}  # fmt: skip
    assert all(on_hub(hub)[file] == (cache / file).read_bytes() for file in tars(on_hub(hub)))


def test_pushing_the_same_again_sends_nothing(hub, cache):
    push(cache, REPO, progress=False)
    before = hub.repos["datasets", REPO].branches["main"]
    hub.requests.clear()
    push(cache, REPO, progress=False)
    assert hub.repos["datasets", REPO].branches["main"] == before
    assert uploads(hub) == 0
    assert list(hub.repos["datasets", REPO].tags) == ["generation-0000"]


def test_only_the_files_of_a_new_generation_are_sent(hub, cache, seal):
    push(cache, REPO, progress=False)
    seal("train", 1, range(8))
    hub.requests.clear()
    push(cache, REPO, progress=False)
    # Two tars, the index of train and the manifest's neighbours: the contact sheet is LFS-free, as PNG.
    assert uploads(hub) == 3
    assert tars(on_hub(hub)) == [*tars(read(cache)), "data/validation/g0000-000000.tar"]


def read(cache: Path) -> list[str]:
    return [shard.file for shard in read_manifest(cache).of("train")]


def test_a_generation_has_a_tag_that_is_never_moved(hub, cache, seal):
    push(cache, REPO, progress=False)
    first = hub.repos["datasets", REPO].tags["generation-0000"]
    seal("train", 0, range(8, 12))
    push(cache, REPO, progress=False)
    seal("train", 1, range(4))
    push(cache, REPO, progress=False)
    tags = hub.repos["datasets", REPO].tags
    assert list(tags) == ["generation-0000", "generation-0000-2", "generation-0001"]
    assert tags["generation-0000"] == first
    counts = [len(tars(on_hub(hub, tag))) for tag in tags]
    assert counts == [3, 4, 5]


def test_half_a_round_stays_at_home(hub, cache, seal):
    seal("train", 1, range(4), complete=False)
    push(cache, REPO, progress=False)
    assert not [name for name in on_hub(hub) if "g0001" in name]
    record = json.loads(on_hub(hub)["manifest.json"])
    assert (record["generation"], len(record["shards"])) == (0, 3)


def test_pruned_shards_are_taken_away_after_the_manifest(hub, cache, seal):
    push(cache, REPO, progress=False)
    seal("train", 1, range(8))
    manifest = read_manifest(cache)
    old = tuple(manifest.of("train", 0))
    write_manifest(cache, replace(manifest, shards=tuple(s for s in manifest.shards if s not in old), pruned=old))
    for shard in old:
        (cache / shard.file).unlink()
    update_index(cache)
    push(cache, REPO, progress=False)
    assert tars(on_hub(hub)) == ["data/train/g0001-000000.tar", "data/train/g0001-000001.tar",
                                 "data/validation/g0000-000000.tar"]  # fmt: skip
    assert len(tars(on_hub(hub, "generation-0001"))) == 5
    assert len(tars(on_hub(hub, "generation-0000"))) == 3


def test_a_push_that_breaks_off_goes_on_where_it_was(hub, cache, monkeypatch):
    monkeypatch.setattr(hub_push, "COMMIT_FILES", 1)
    second = read_manifest(cache).shards[1]
    hub.fail[f"PUT /lfs/{second.sha256}"] = 400
    with pytest.raises(UserError, match=REPO):
        push(cache, REPO, progress=False)
    assert set(on_hub(hub)) == {".gitattributes", "data/train/g0000-000000.tar"}
    assert hub.repos["datasets", REPO].tags == {}
    hub.fail.clear()
    hub.requests.clear()
    push(cache, REPO, progress=False)
    assert uploads(hub) == 4  # the other two tars, two indexes
    assert len(tars(on_hub(hub))) == 3
    assert "manifest.json" in on_hub(hub)


def test_a_reader_never_finds_a_manifest_without_its_shards(hub, cache, seal, monkeypatch):
    monkeypatch.setattr(hub_push, "COMMIT_FILES", 1)
    push(cache, REPO, progress=False)
    seal("train", 1, range(8))
    push(cache, REPO, progress=False)
    for tree in hub.repos["datasets", REPO].commits.values():
        if "manifest.json" in tree:
            named = {shard["file"] for shard in json.loads(hub.content(tree["manifest.json"].sha256))["shards"]}
            assert named <= set(tree)


def test_another_cache_is_not_pushed_over_this_one(hub, cache, seal, tmp_path):
    push(cache, REPO, progress=False)
    before = on_hub(hub)
    other = seal("train", 0, range(4, 8), folder=tmp_path / "other")
    with pytest.raises(UserError, match=r"holds data/train/g0000-000000\.tar of another cache"):
        push(other, REPO, progress=False)
    assert on_hub(hub) == before


def test_a_push_of_somebody_else_at_the_same_time_is_noticed(hub, cache, monkeypatch):
    monkeypatch.setattr(hub_push, "COMMIT_FILES", 1)
    second = read_manifest(cache).shards[1]
    sent = hub_push._sent_shard

    def meanwhile(remote, folder, shard):
        if shard == second:
            hub.add(REPO, {"notes.txt": b"theirs"}, kind="datasets")
        return sent(remote, folder, shard)

    monkeypatch.setattr(hub_push, "_sent_shard", meanwhile)
    with pytest.raises(UserError, match="somebody else changed it meanwhile"):
        push(cache, REPO, progress=False)
    assert "manifest.json" not in on_hub(hub)
    monkeypatch.setattr(hub_push, "_sent_shard", sent)
    push(cache, REPO, progress=False)
    assert {"notes.txt", "manifest.json"} <= set(on_hub(hub))


def test_a_damaged_shard_is_not_sent(hub, cache):
    path = cache / "data/train/g0000-000001.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"g0000-000001\.tar: sha256 is \w{64}, the manifest says"):
        push(cache, REPO, progress=False)
    assert "manifest.json" not in on_hub(hub)


# Terms and secrets


def terms(distillation: str, url: str = "") -> Change:
    provenance = json.dumps({"terms_url": url} if url else {})
    return lambda sample: (
        replace(sample, distillation=distillation, teacher="seedance", provenance_json=provenance)
        if sample.seed % 2 == 0
        else sample
    )


def test_videos_whose_terms_forbid_distillation_are_never_sent(hub, seal):
    cache = seal("train", 0, range(12), change=terms("disallowed", "https://example.org/terms"))
    with pytest.raises(UserError, match=r"terms of seedance \(https://example.org/terms\) do not allow distillation"):
        push(cache, REPO, progress=False)
    assert hub.requests == []


def test_unknown_terms_are_warned_of_and_stand_in_the_card(hub, seal, caplog):
    push(seal("train", 0, range(12), change=terms("unknown", "https://example.org/terms")), REPO, progress=False)
    assert "whether the terms of seedance allow distillation is unknown" in caplog.text
    card = on_hub(hub)["README.md"].decode()
    assert "distillation under its terms: unknown, see <https://example.org/terms>" in card
    assert "distillation under its terms: allowed" in card


@pytest.mark.parametrize("place", ["prompt", "provenance_json"])
def test_a_token_in_a_record_is_not_sent(hub, seal, place):
    cache = seal("train", 0, range(4), change=lambda sample: replace(sample, **{place: "hf_token_of_alice"}))
    with pytest.raises(UserError, match="has your token") as error:
        push(cache, REPO, progress=False)
    assert "hf_token_of_alice" not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, REPO, "no token for the Hub: run `hf auth login`"),
        ("hf_wrong", REPO, "the Hub does not know your token"),
        ("hf_token_of_alice", "bob/clips", "your token may not write there"),
        ("hf_token_of_alice", "clips", "not the name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, cache, tmp_path, monkeypatch, token, repo, message):
    connect(hub.url, tmp_path / "home", monkeypatch, token)
    with pytest.raises(UserError) as error:
        push(cache, repo, progress=False)
    assert message in str(error.value)


def test_a_hub_that_does_not_answer_is_said(cache, tmp_path, monkeypatch):
    connect("http://127.0.0.1:9", tmp_path / "home", monkeypatch)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        push(cache, REPO, progress=False)


def test_a_public_repository_is_not_taken_for_a_private_one(hub, cache):
    push(cache, REPO, progress=False)
    with pytest.raises(UserError, match="is there and public"):
        push(cache, REPO, private=True, progress=False)


def test_an_empty_cache_is_not_pushed(hub, tmp_path):
    with pytest.raises(UserError, match="nothing is sealed"):
        push(tmp_path, REPO, progress=False)
    assert hub.requests == []


# The card


def test_the_card_counts_prompts_videos_and_cost(cache, seal):
    seal("train", 1, range(4), change=lambda sample: replace(sample, cost=0.5, currency="EUR"))
    write_card(cache)
    card = (cache / "README.md").read_text()
    assert "16 videos of 12 prompts" in card
    assert "| train | 12 | 8 | 3 |" in card
    assert "Cost: 2.00 EUR for 4 videos" in card
    assert "| 0 | 12 | 2023-11-14 |" in card
    assert "| 1 | 4 | 2023-11-15 |" in card
    assert (cache / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_statistics_of_words_are_those_of_the_prompts(cache):
    write_card(cache)  # 3 to 10 words in train, 3 to 6 in validation
    assert "Prompts: 3 to 10 words, median 5\n" in (cache / "README.md").read_text()


def test_a_generation_that_was_wholly_replaced_is_not_shown_to_stock_readers(cache, seal):
    seal("train", 1, range(8))
    write_card(cache)
    card = (cache / "README.md").read_bytes()
    assert paths(card) == {"train": ["data/train/g0001-*.tar"], "validation": ["data/validation/g0000-*.tar"]}
    assert b"Every key is there once" in card


def test_where_a_part_was_replaced_both_generations_are_shown_and_the_card_says_so(cache, seal):
    seal("train", 1, range(3))
    write_card(cache)
    card = (cache / "README.md").read_bytes()
    assert paths(card)["train"] == ["data/train/g0000-*.tar", "data/train/g0001-*.tar"]
    assert b"3 older videos, which later ones of the same key replace" in card


def test_half_a_round_is_not_in_the_card(cache, seal):
    write_card(cache)
    before = (cache / "README.md").read_bytes()
    seal("train", 1, range(4), complete=False)
    write_card(cache)
    assert (cache / "README.md").read_bytes() == before


def test_words_of_strangers_are_no_markup(seal):
    evil = "<img src=x onerror=alert(1)> | [a](http://b) ![c](d)\n---\n# `e` {{ 7 * 7 }}"
    cache = seal("train", 0, range(4), change=lambda sample: replace(sample, prompt=evil, licence="x: *y*\n- z"))
    write_card(cache)
    card = (cache / "README.md").read_text()
    spoken = r"\<img src=x onerror=alert\(1\)\> \| \[a\]\(http://b\) \!\[c\]\(d\) --- \# \`e\` \{\{ 7 \* 7 \}\}"
    assert f"* {spoken}\n" in card
    assert card.count(evil.split("\n")[0]) == 0
    assert (head(card.encode())["license"], head(card.encode())["license_name"]) == ("other", "x-y-z")


def test_an_address_of_terms_that_is_none_is_no_markup(seal):
    cache = seal("train", 0, range(4), change=terms("allowed", "https://a/><script>[b](c)"))
    write_card(cache)
    assert r"see https://a/\>\<script\>\[b\]\(c\)" in (cache / "README.md").read_text()


def test_the_same_cache_gives_the_same_card_and_picture(cache):
    write_card(cache)
    before = [(cache / name).read_bytes() for name in ("README.md", "contact-sheet.png")]
    write_card(cache)
    assert [(cache / name).read_bytes() for name in ("README.md", "contact-sheet.png")] == before


# Stock readers


def test_datasets_streams_every_sample_with_the_declared_features(hub, cache, seal, tmp_path, monkeypatch):
    connect(hub.url, tmp_path / "home", monkeypatch)
    seal("train", 1, range(4), complete=False)
    push(cache, REPO, progress=False)
    for split, count in (("train", 8), ("validation", 4)):
        stream = datasets.load_dataset(REPO, split=split, streaming=True)
        features = stream.features or {}
        assert features["json"]["cost"] == datasets.Value("float64")
        assert isinstance(features["mp4"], datasets.Video)
        rows = list(stream.cast_column("mp4", datasets.Video(decode=False)))
        wanted = {row["key"]: row["mp4_sha256"] for row in read_index(cache, split).to_pylist()}
        assert len(rows) == count
        assert {row["__key__"].rsplit("/", 1)[-1]: row["json"]["video_sha256"] for row in rows} == wanted
        assert all(row["mp4"]["bytes"][4:8] == b"ftyp" for row in rows)


def test_webdataset_reads_a_pulled_shard(hub, cache, tmp_path):
    from webdataset.compat import WebDataset

    push(cache, REPO, progress=False)
    pull(SOURCE, tmp_path / "copy", progress=False)
    files = [str(tmp_path / "copy" / shard.file) for shard in read_manifest(cache).of("train")]
    rows = list(WebDataset(files, shardshuffle=False))
    assert [row["__key__"] for row in rows] == [row["key"] for row in read_index(cache, "train").to_pylist()]


def test_a_stream_reads_the_dataset_where_it_lies(hub, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    push(cache, REPO, progress=False)
    stream = Stream(local_head(f"{SOURCE}@generation-0000"), StreamConfig(), "train", seed=0)
    drawn = {example.key: example.mp4_sha256 for example in stream.next_batch(8)}
    assert drawn == {row["key"]: row["mp4_sha256"] for row in read_index(cache, "train").to_pylist()}


# Pull


@pytest.fixture
def pushed(hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    push(cache, REPO, progress=False)
    return cache


def test_what_is_pulled_is_what_was_pushed(pushed, hub, tmp_path, caplog):
    caplog.set_level("INFO")
    manifest = pull(SOURCE, tmp_path / "copy", progress=False)
    assert manifest == read_manifest(tmp_path / "copy") == read_manifest(pushed)
    assert members(tmp_path / "copy") == members(pushed)
    assert verify(tmp_path / "copy") == []
    assert (tmp_path / "copy" / "README.md").read_bytes() == on_hub(hub)["README.md"]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        ".lock", "README.md", "contact-sheet.png", "data", "index", "manifest.json"]  # fmt: skip
    assert "3 shards" in caplog.text


def test_a_pulled_cache_is_brought_up_to_date_with_what_is_new(pushed, hub, seal, tmp_path):
    pull(SOURCE, tmp_path / "copy", progress=False)
    seal("train", 1, range(4))
    push(pushed, REPO, progress=False)
    hub.requests.clear()
    pull(SOURCE, tmp_path / "copy", progress=False)
    assert [line for line in hub.requests if line.startswith("GET") and line.endswith(".tar")] == [
        f"GET /datasets/{REPO}/resolve/{hub.repos['datasets', REPO].branches['main']}/data/train/g0001-000000.tar"
    ]
    assert members(tmp_path / "copy") == members(pushed)


def test_a_revision_is_the_cache_at_that_time(pushed, seal, tmp_path):
    before = members(pushed)
    seal("train", 1, range(4))
    push(pushed, REPO, progress=False)
    pull(f"{SOURCE}@generation-0000", tmp_path / "copy", progress=False)
    assert members(tmp_path / "copy") == before


def test_whole_shards_stay_and_half_ones_start_again(pushed, hub, tmp_path):
    copy, files = tmp_path / "copy", tars(on_hub(hub))
    hub.fail[rf"GET .*{files[2]}"] = 403
    with pytest.raises(UserError, match=SOURCE):
        pull(SOURCE, copy, progress=False)
    assert not (copy / "manifest.json").exists()
    assert len(list(copy.rglob("*.tar"))) == 2
    (copy / files[1]).write_bytes(on_hub(hub)[files[1]][:1000])
    hub.fail.clear()
    hub.requests.clear()
    pull(SOURCE, copy, progress=False)
    assert members(copy) == members(pushed)
    assert sorted({line.rpartition("/")[2] for line in hub.requests if line.startswith("GET") and ".tar" in line}) == [
        "g0000-000000.tar", "g0000-000001.tar"]  # fmt: skip


def test_a_download_that_breaks_off_is_tried_again(pushed, hub, tmp_path):
    hub.cut["data/train/g0000-000000.tar"] = [1000, 2000]
    pull(SOURCE, tmp_path / "copy", progress=False)
    assert hub.cut["data/train/g0000-000000.tar"] == []
    assert members(tmp_path / "copy") == members(pushed)


def test_a_shard_that_is_not_what_its_hash_says_is_not_taken(pushed, hub, tmp_path):
    data = bytearray(on_hub(hub)["data/train/g0000-000001.tar"])
    data[600] ^= 1
    hub.add(REPO, {"data/train/g0000-000001.tar": bytes(data)}, kind="datasets")
    with pytest.raises(UserError, match=r"g0000-000001\.tar has sha256 \w{64}, the manifest says"):
        pull(SOURCE, tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy" / "data/train/g0000-000001.tar").exists()
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_shard_of_another_size_is_not_even_asked_for(pushed, hub, tmp_path):
    hub.add(REPO, {"data/train/g0000-000001.tar": b"short"}, kind="datasets")
    hub.requests.clear()
    with pytest.raises(UserError, match=r"g0000-000001\.tar has 5 bytes, the manifest says"):
        pull(SOURCE, tmp_path / "copy", progress=False)
    assert not [line for line in hub.requests if line.startswith("GET") and line.endswith(".tar")]


@pytest.mark.parametrize("file", ["../../evil.tar", "/etc/passwd", "data/train/../x.tar", "data/train/g0000-000000.py"])
def test_a_manifest_that_names_anything_else_is_refused(pushed, hub, tmp_path, file):
    record = json.loads(on_hub(hub)["manifest.json"])
    record["shards"][0]["file"] = file
    hub.add(REPO, {"manifest.json": json.dumps(record).encode()}, kind="datasets")
    with pytest.raises(UserError, match="is not the name of a shard"):
        pull(SOURCE, tmp_path / "copy", progress=False)
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_holds_something_else_is_left_alone(pushed, seal, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds diary\.txt, which is of no cache"):
        pull(SOURCE, tmp_path / "notes", progress=False)
    other = seal("train", 0, range(4, 8), folder=tmp_path / "other")
    before = members(other)
    with pytest.raises(UserError, match="is of another cache than"):
        pull(SOURCE, other, progress=False)
    assert members(other) == before
    (other / "journal.sqlite").touch()
    with pytest.raises(UserError, match=r"is a cache with journal\.sqlite"):
        pull(SOURCE, other, progress=False)


@pytest.mark.parametrize("as_url", [False, True])
def test_a_cache_is_pulled_from_a_path_or_an_address(cache, tmp_path, monkeypatch, as_url):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    source = cache.as_uri() if as_url else str(cache)
    pull(source, tmp_path / "copy", progress=False)
    assert members(tmp_path / "copy") == members(cache)
    assert (tmp_path / "copy" / "README.md").exists()


def test_pruned_shards_go_unless_a_trainer_reads_here(pushed, seal, tmp_path):
    copy = tmp_path / "copy"
    pull(SOURCE, copy, progress=False)
    seal("train", 1, range(8))
    manifest = read_manifest(pushed)
    old = tuple(manifest.of("train", 0))
    write_manifest(pushed, replace(manifest, shards=tuple(s for s in manifest.shards if s not in old), pruned=old))
    update_index(pushed)
    push(pushed, REPO, progress=False)
    lease = Lease(copy, 0, "run")
    pull(SOURCE, copy, progress=False)
    assert {place.shard for place in read_places(copy, "train", generation=0).values()} == set(old)
    assert {place.shard.generation for place in read_places(copy, "train").values()} == {1}
    assert verify(copy) == []
    lease.release()
    pull(SOURCE, copy, progress=False)
    assert not any((copy / shard.file).exists() for shard in old)
    assert read_manifest(copy) == read_manifest(pushed)


def test_two_pulls_do_not_fill_a_folder_at_once(pushed, tmp_path):
    copy = tmp_path / "copy"
    pull(SOURCE, copy, progress=False)
    with one_writer(copy / LOCK, "cache"), pytest.raises(UserError, match="copy: another afd process"):
        pull(SOURCE, copy, progress=False)


def test_a_tar_without_the_samples_that_the_manifest_promises_is_named(tmp_path):
    file = "data/train/g0000-000000.tar"
    (tmp_path / "bad" / file).parent.mkdir(parents=True)
    (tmp_path / "bad" / file).write_bytes(bytes(10240))
    shard = replace(describe_shard(tmp_path / "bad", file), samples=3)
    write_manifest(tmp_path / "bad", Manifest(0, (shard,)))
    for look in (lambda folder: inspect(folder), lambda folder: pull(str(folder), tmp_path / "copy", progress=False)):
        with pytest.raises(UserError, match=r"g0000-000000\.tar: holds 0 samples, the manifest says 3"):
            look(tmp_path / "bad")


# Heads


def test_a_head_whose_tars_lie_elsewhere_is_pushed(hub, cache, tmp_path, monkeypatch):

    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    folder = local_head(cache.as_uri())
    assert not list(folder.rglob("*.tar"))
    push(folder, REPO, progress=False)
    assert {name: on_hub(hub)[name] for name in tars(on_hub(hub))} == {
        shard.file: (cache / shard.file).read_bytes() for shard in read_manifest(cache).shards
    }
    assert "origin.json" not in on_hub(hub)


def test_a_record_that_forbids_it_is_found_where_the_tars_lie_elsewhere(hub, seal, tmp_path, monkeypatch):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))

    def forbid(sample: Sample) -> Sample:
        return replace(sample, distillation="disallowed") if sample.seed == 3 else sample

    cache = seal("train", 0, range(4), change=forbid)  # its shard's first record allows it
    with pytest.raises(UserError, match="terms of drawn do not allow distillation"):
        push(local_head(cache.as_uri()), REPO, progress=False)
    assert uploads(hub) == 0


# The command line


def test_the_commands_push_pull_verify_and_inspect(afd, hub, cache, tmp_path):
    pushed = afd("cache", "push", cache, REPO)
    assert pushed.exit_code == 0, pushed.output
    assert f"datasets/{REPO}" in pushed.stdout
    pulled = afd("cache", "pull", SOURCE, tmp_path / "copy")
    assert pulled.exit_code == 0, pulled.output
    assert verify(tmp_path / "copy") == []
    assert "every hash is right" in afd("cache", "verify", SOURCE).stdout
    looked = afd("cache", "inspect", SOURCE, "-o", tmp_path / "sheet.png")
    assert looked.exit_code == 0, looked.output
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_cache_teacher_pushes_what_it_made_and_only_what_is_new(afd, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red ball falls\na blue ball falls\n")
    Path("r.yaml").write_text(
        "out: run\nvideo: {width: 16, height: 16, frames: 4, lossless: true}\n"
        "prompts: {source: prompts.txt}\nteacher: {name: playground}\ncache: {frozen: 0.0, near_duplicate: -1}\n"
    )
    for more in ("", "a green ball falls\n"):
        with Path("prompts.txt").open("a") as file:
            file.write(more)
        made = afd("cache-teacher", "r.yaml", "--push-to-hub", REPO, "--private")
        assert made.exit_code == 0, made.output
    tars = [path for path in hub.files(REPO, kind="datasets") if path.endswith(".tar")]
    assert len(tars) == 2
    assert sum(request.startswith("PUT") for request in hub.requests) < 2 * len(hub.files(REPO, kind="datasets"))
