"""The stream: its order, its exact resume, and what it says about shards it cannot use."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from afd_data.config import StreamConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.index import index_path, update_index
from afd_data.sample import Sample, parse_sample
from afd_data.shards import Content, Manifest, read_manifest, write_manifest, write_shard
from afd_data.stream import Stream, epoch_order
from afd_data.video import write_mp4
from afd_data.view import View, newest_views

VIDEO = VideoConfig(width=16, height=16, frames=3, fps=8.0, lossless=True)
TAKES = {f"p{number}": [f"p{number}-{take:02d}" for take in range(1 + number % 3)] for number in range(20)}


def content(folder: Path, key: str, level: int) -> Content:
    """A sample whose three frames are grey `level`."""
    write_mp4(folder / "clip", np.full((3, 16, 16, 3), level, np.uint8), VIDEO)
    mp4 = (folder / "clip").read_bytes()
    prompt, _, take = key.rpartition("-")
    sample = Sample(
        schema_version=1,
        key=key,
        prompt_id=prompt,
        prompt=f"prompt {prompt}",
        split="train",
        take=int(take),
        generation=0,
        fingerprint="f" * 64,
        seed=0,
        teacher="playground",
        teacher_version="1",
        requested_json="{}",
        effective_json="{}",
        provenance_json="{}",
        world_json="{}",
        licence="unknown",
        distillation="unknown",
        cost=0.0,
        currency="USD",
        width=16,
        height=16,
        frames=3,
        fps=8.0,
        duration_s=0.375,
        video_sha256=hashlib.sha256(mp4).hexdigest(),
        perceptual_hash="0" * 16,
    )
    return Content(key, 1.0, mp4, sample.to_json())


def cache(folder: Path, per_shard: int = 3, prompts: int = 4, reverse: bool = False) -> Path:
    """A sealed cache: 4 prompts with 1, 2, 3 and 1 takes; sample number n is grey 10 n."""
    keys = [key for number in range(prompts) for key in TAKES[f"p{number}"]]
    folder.mkdir()
    contents = [content(folder, key, 10 * number) for number, key in enumerate(keys)]
    (folder / "clip").unlink()
    contents = contents[::-1] if reverse else contents
    manifest = Manifest()
    for number, start in enumerate(range(0, len(contents), per_shard)):
        file = f"data/train/g0000-{number:06d}.tar"
        manifest = manifest.with_shard(write_shard(folder, file, contents[start : start + per_shard]))
    write_manifest(folder, manifest)
    update_index(folder)
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("stream") / "cache")


def stream(folder: Path, seed: int = 0, **settings: object) -> Stream:
    places = {name: settings.pop(name) for name in ("rank", "ranks", "video", "decode") if name in settings}
    return Stream(folder, StreamConfig(**settings), "train", seed, **places)  # type: ignore[arg-type]


def keys(source: Stream, count: int) -> list[str]:
    return [example.key for example in source.next_batch(count)]


def test_an_epoch_visits_every_sample_once() -> None:
    order = epoch_order(TAKES, seed=1, epoch=0)
    assert sorted(order) == sorted(key for takes in TAKES.values() for key in takes)


def test_each_round_visits_every_prompt_that_has_takes_left_once() -> None:
    order = [key.split("-")[0] for key in epoch_order(TAKES, seed=1, epoch=0)]
    with_takes = [[p for p, takes in TAKES.items() if len(takes) > number] for number in range(3)]
    assert [len(prompts) for prompts in with_takes] == [20, 13, 6]
    for prompts, start in zip(with_takes, (0, 20, 33), strict=True):
        assert sorted(order[start : start + len(prompts)]) == sorted(prompts)


def test_seed_and_epoch_change_the_order_and_nothing_else_does() -> None:
    first = epoch_order(TAKES, seed=1, epoch=0)
    backwards = {prompt: takes[::-1] for prompt, takes in reversed(TAKES.items())}
    assert epoch_order(backwards, seed=1, epoch=0) == first
    others = [epoch_order(TAKES, seed=1, epoch=1), epoch_order(TAKES, seed=2, epoch=0)]
    assert all(other != first for other in others)


def test_the_first_take_of_a_prompt_is_not_always_the_first_visited() -> None:
    first_takes = [epoch_order({"p": ["p-00", "p-01"]}, seed, 0)[0] for seed in range(50)]
    assert 10 < Counter(first_takes)["p-00"] < 40


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_read_together_what_one_rank_reads_over_all_epochs(sealed: Path, ranks: int) -> None:
    alone = keys(stream(sealed), 6 * ranks)  # of 7 samples, which no number of ranks divides
    together = [keys(stream(sealed, rank=rank, ranks=ranks), 6) for rank in range(ranks)]
    assert [key for row in zip(*together, strict=True) for key in row] == alone


def test_the_order_does_not_depend_on_shards_or_index(sealed: Path, tmp_path: Path) -> None:
    other = cache(tmp_path / "other", per_shard=2, reverse=True)
    index_path(other, "train").unlink()
    assert keys(stream(other), 14) == keys(stream(sealed), 14)


def test_an_example_is_what_was_sealed(sealed: Path) -> None:
    examples = stream(sealed).next_batch(7)
    assert len({example.key for example in examples}) == 7
    for example in examples:
        number = sorted(other.key for other in examples).index(example.key)
        assert example.video.shape == (3, 16, 16, 3)
        assert (example.video == 10 * number).all()
        assert (example.prompt, example.fps) == (f"prompt {example.prompt_id}", 8.0)


def test_resume_goes_on_at_the_exact_sample_in_any_epoch(sealed: Path) -> None:
    unbroken = keys(stream(sealed), 30)
    for drawn in (0, 4, 7, 18):
        first, second = stream(sealed), stream(sealed)
        keys(first, drawn)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert keys(second, 30 - drawn) == unbroken[drawn:]


def test_a_state_of_other_data_or_another_seed_is_refused(sealed: Path, tmp_path: Path) -> None:
    state = stream(sealed).state_dict()
    for other in (stream(cache(tmp_path / "less", prompts=3)), stream(sealed, seed=1)):
        with pytest.raises(UserError, match="not those that the interrupted run used"):
            other.load_state_dict(state)


def test_memory_holds_no_more_than_it_may_and_changes_nothing(sealed: Path) -> None:
    small, none = stream(sealed), stream(sealed, memory_mb=0)
    small._memory.limit_bytes = 3 * 3 * 16 * 16 * 3  # three clips
    assert keys(small, 20) == keys(none, 20)
    assert small._memory.bytes == 3 * 3 * 16 * 16 * 3
    assert none._memory.bytes == 0


def test_videos_cannot_be_changed_by_their_reader(sealed: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        stream(sealed).next_batch(1)[0].video[:] = 0


def test_worker_processes_change_neither_order_nor_frames_nor_resume(sealed: Path) -> None:
    alone = stream(sealed).next_batch(20)
    with stream(sealed, workers=2, memory_mb=0) as shared:
        batch = shared.next_batch(9)
        state = shared.state_dict()
        batch += shared.next_batch(3)
        shared.load_state_dict(state)
        batch[9:] = shared.next_batch(11)
        processes = list(shared._pool._processes.values())  # type: ignore[union-attr]
    assert [example.key for example in batch] == [example.key for example in alone]
    assert all(np.array_equal(a.video, b.video) for a, b in zip(alone, batch, strict=True))
    assert not any(process.is_alive() for process in processes)


def test_an_error_in_a_worker_process_reaches_the_reader(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    damage(folder, "p1-00", "mp4")
    with stream(folder, workers=1) as source, pytest.raises(UserError, match=r"p1-00\.mp4 is not what was sealed"):
        source.next_batch(7)


def test_a_worker_process_that_died_is_named_before_more_work_is_handed_to_it(sealed: Path) -> None:
    with stream(sealed, workers=1, memory_mb=0) as source:
        source.next_batch(1)
        pool = source._pool
        for process in list(pool._processes.values()):  # type: ignore[union-attr]
            process.kill()
        deadline = time.monotonic() + 60
        while not pool._broken and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"stream\.workers: a decoding process died"):
            source.next_batch(1)


def damage(folder: Path, key: str, kind: str) -> None:
    """Flip one byte in the middle of a member."""
    table = pyarrow.parquet.read_table(index_path(folder, "train")).to_pylist()
    row = next(row for row in table if row["key"] == key)
    path = folder / row["shard"]
    data = bytearray(path.read_bytes())
    data[row[f"{kind}_offset"] + row[f"{kind}_size"] // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["mp4", "json"])
def test_a_flipped_byte_is_found_and_named(tmp_path: Path, kind: str) -> None:
    folder = cache(tmp_path / "cache")
    damage(folder, "p1-00", kind)
    with pytest.raises(UserError, match=rf"g0000-000000\.tar: p1-00\.{kind} is not what was sealed"):
        stream(folder).next_batch(7)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    path = folder / "data/train/g0000-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"g0000-000001\.tar: truncated in p"):
        stream(folder).next_batch(7)
    index_path(folder, "train").unlink()
    with pytest.raises(UserError, match=r"g0000-000001\.tar: truncated"):
        stream(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    (folder / "data/train/g0000-000001.tar").unlink()
    with pytest.raises(UserError, match=r"g0000-000001\.tar: cannot be read \(No such file"):
        stream(folder).next_batch(7)
    index_path(folder, "train").unlink()
    with pytest.raises(UserError, match=r"g0000-000001\.tar: cannot be read"):
        stream(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mp4_size": 2**60}, "remove it"),
        ({"mp4_offset": -1}, "remove it"),
        ({"mp4_offset": 0}, "is not what was sealed"),
        ({"mp4_offset": None}, "has empty cells"),
        ({"mp4_sha256": "../../elsewhere"}, "remove it"),
        ({"json_sha256": "/etc/passwd"}, "remove it"),
        ({"mp4_sha256": "F" * 64}, "remove it"),
        ({"shard": "../../elsewhere.tar"}, None),
    ],
)
def test_a_hostile_index_reads_nothing_but_sealed_members(tmp_path: Path, change: dict, message: str | None) -> None:
    folder = cache(tmp_path / "cache")
    table = pyarrow.parquet.read_table(index_path(folder, "train"))
    rows = [row | change for row in table.to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), index_path(folder, "train"))
    if message is None:  # no such shard in the manifest: the tars are read instead
        assert len(keys(stream(folder), 7)) == 7
        return
    with pytest.raises(UserError, match=message):
        stream(folder).next_batch(7)


def test_a_clip_of_another_shape_is_named_with_what_to_do(sealed: Path) -> None:
    assert len(stream(sealed, video=VIDEO).next_batch(7)) == 7
    for change in ({"frames": 12}, {"width": 32}, {"fps": 16.0}):
        with pytest.raises(UserError, match=r"p\d-\d\d\.mp4: 3 frames of 16x16 at 8 fps, the recipe wants .*Set video"):
            stream(sealed, video=replace_video(**change)).next_batch(1)


def replace_video(**change: object) -> VideoConfig:
    return VIDEO.model_copy(update=change)


def test_a_folder_without_samples_says_what_to_run(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no train samples\. Run `afd cache-teacher`"):
        stream(tmp_path)


def test_a_sample_is_found_by_its_key(sealed: Path) -> None:
    source = stream(sealed)
    assert source.keys == sorted(key for number in range(4) for key in TAKES[f"p{number}"])
    assert source.example("p2-01").take == 1
    with pytest.raises(UserError, match="no train sample 'p9-00'"):
        source.example("p9-00")
    assert source.drawn == 0


def test_without_decoding_examples_are_the_same_but_for_their_frames(sealed: Path) -> None:
    decoded, plain = stream(sealed).next_batch(7), stream(sealed, decode=False, video=VIDEO).next_batch(7)
    for with_frames, without in zip(decoded, plain, strict=True):
        assert without.video.shape == (0, 16, 16, 3)
        assert without.video.dtype == np.uint8
        assert replace(with_frames, video=without.video) == without


def test_worker_processes_need_not_decode_either(sealed: Path) -> None:
    with stream(sealed, workers=1, decode=False) as source:
        assert [len(example.video) for example in source.next_batch(3)] == [0, 0, 0]


def test_without_decoding_clips_are_still_checked(sealed: Path, tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    damage(folder, "p1-00", "mp4")
    with pytest.raises(UserError, match=r"p1-00\.mp4 is not what was sealed"):
        stream(folder, decode=False).next_batch(7)
    with pytest.raises(UserError, match="the recipe wants"):
        stream(sealed, decode=False, video=replace_video(frames=12)).next_batch(1)


def test_a_sample_can_be_decoded_all_the_same(sealed: Path) -> None:
    source = stream(sealed, decode=False)
    assert len(source.example("p2-01").video) == 0
    assert np.array_equal(source.decoded("p2-01").video, stream(sealed).example("p2-01").video)
    with pytest.raises(UserError, match="no train sample 'p9-00'"):
        source.decoded("p9-00")


def test_an_example_knows_the_hash_of_its_mp4(sealed: Path) -> None:
    for example in stream(sealed).next_batch(7):
        assert example.mp4_sha256 == example.sample.video_sha256


def grown(folder: Path) -> Path:
    """The cache with p1-00 and p2-01 made again in round 1, and p9-00, new in round 2; both are complete."""
    cache(folder)
    add_round(folder, 1, ["p1-00", "p2-01"])
    add_round(folder, 2, ["p9-00"])
    return folder


def add_round(folder: Path, generation: int, made: list[str], complete: bool = True) -> None:
    """Every sample of round g is grey 200 + g."""
    manifest = read_manifest(folder)
    contents = []
    for key in made:
        sealed = content(folder, key, 200 + generation)
        sample = replace(parse_sample(sealed.json, key), generation=generation)
        contents.append(replace(sealed, json=sample.to_json()))
    (folder / "clip").unlink()
    shard = write_shard(folder, manifest.next_file("train", generation), contents)
    newest = generation if complete else manifest.generation
    write_manifest(folder, replace(manifest.with_shard(shard), generation=newest))
    update_index(folder)


def at(folder: Path, generation: int | None = None) -> View:
    return newest_views(folder, ["train"], generation)["train"]


def view(folder: Path, generation: int | None = None) -> dict[str, int]:
    """Key -> grey level of what a stream reads."""
    source = Stream(folder, StreamConfig(), "train", 0, view=at(folder, generation))
    return {key: int(source.example(key).video[0, 0, 0, 0]) for key in source.keys}


def test_a_view_has_the_newest_sample_of_each_key_up_to_its_generation(tmp_path: Path) -> None:
    folder = grown(tmp_path / "cache")
    first = {"p0-00": 0, "p1-00": 10, "p1-01": 20, "p2-00": 30, "p2-01": 40, "p2-02": 50, "p3-00": 60}
    assert view(folder, 0) == first
    assert view(folder, 1) == first | {"p1-00": 201, "p2-01": 201}
    assert view(folder) == view(folder, 2) == first | {"p1-00": 201, "p2-01": 201, "p9-00": 202}


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_of_a_round_that_is_not_complete_are_no_data(tmp_path: Path, with_index: bool) -> None:
    folder = cache(tmp_path / "cache")
    before = view(folder)
    add_round(folder, 1, ["p1-00", "p9-00"], complete=False)
    if not with_index:
        index_path(folder, "train").unlink()
    assert view(folder) == before
    with pytest.raises(UserError, match="generation 1 is not complete here, the newest is 0"):
        view(folder, 1)


def test_a_stream_keeps_its_view_until_it_is_switched(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    source, untouched = stream(folder, memory_mb=0), stream(folder)
    alone = keys(untouched, 10)
    batch = source.next_batch(5)
    add_round(folder, 1, ["p1-00", "p1-01", "p2-00", "p2-01", "p2-02"])
    batch += source.next_batch(5)
    assert [example.key for example in batch] == alone
    assert {example.generation for example in batch} == {0}


def test_a_switch_reads_the_new_view_once_an_epoch_and_forgets_old_frames(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    source = stream(folder)
    source.next_batch(9)
    add_round(folder, 1, ["p1-00", "p9-00"])
    source.switch(at(folder, 1))
    levels = {example.key: int(example.video[0, 0, 0, 0]) for example in source.next_batch(8)}
    assert levels == view(folder)
    assert levels["p1-00"] == levels["p9-00"] == 201


def test_no_two_views_begin_in_the_same_order(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache")
    source = stream(folder)
    orders = [keys(source, 3)]
    for generation in range(1, 5):
        add_round(folder, generation, ["p0-00"])
        source.switch(at(folder, generation))
        orders.append(keys(source, 3))
    assert len({tuple(order) for order in orders}) == 5


def test_resume_is_exact_before_and_after_switches_in_any_epoch(tmp_path: Path) -> None:
    folder = grown(tmp_path / "cache")

    def run(source: Stream, first: int) -> list[tuple[str, int]]:
        """Draws of generation 0 up to 9, of 1 up to 12 (less than an epoch), of 2 up to 30."""
        drawn = []
        for number in range(first, 30):
            if number in (9, 12):
                source.switch(at(folder, source.generation + 1))
            drawn += [(example.key, example.generation) for example in source.next_batch(1)]
            states.append(json.loads(json.dumps(source.state_dict())))
        return drawn

    states: list[dict] = []
    unbroken = run(Stream(folder, StreamConfig(), "train", 0, view=at(folder, 0)), 0)
    for first, state in enumerate(states[:29], start=1):
        resumed = stream(folder)
        resumed.load_state_dict(state)
        assert run(resumed, first) == unbroken[first:]
    assert states[8]["history"] == []
    assert states[29]["history"] == [[0, 9], [1, 3]]
    assert (states[29]["view"]["generation"], states[29]["drawn"]) == (2, 18)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_switch_together(tmp_path: Path, ranks: int) -> None:
    folder = grown(tmp_path / "cache")
    sources = [Stream(folder, StreamConfig(), "train", 0, rank, ranks, view=at(folder, 0)) for rank in range(ranks)]
    alone = Stream(folder, StreamConfig(), "train", 0, view=at(folder, 0))
    for generation in (1, 2):
        together = [keys(source, 4) for source in sources]
        assert [key for row in zip(*together, strict=True) for key in row] == keys(alone, 4 * ranks)
        for source in (*sources, alone):
            source.switch(at(folder, generation))
    assert all(source.state_dict() == alone.state_dict() for source in sources)


def test_worker_processes_read_the_new_view_after_a_switch(tmp_path: Path) -> None:
    folder = grown(tmp_path / "cache")
    with Stream(folder, StreamConfig(workers=1), "train", 0, view=at(folder, 0)) as source:
        source.next_batch(1)
        source.switch(at(folder, 1))
        assert {example.key: example.generation for example in source.next_batch(7)}["p2-01"] == 1


def test_a_failed_switch_leaves_the_stream_as_it_was(sealed: Path) -> None:
    source, other = stream(sealed), stream(sealed)
    assert keys(source, 5) == keys(other, 5)
    with pytest.raises(UserError, match="no train samples"):
        source.switch(View(1, ("data/train/g0001-000000.tar",)))
    assert source.state_dict() == other.state_dict()
    assert keys(source, 9) == keys(other, 9)


@pytest.mark.parametrize("what", ["a part", "all"])
def test_a_view_that_was_pruned_is_named_on_resuming(tmp_path: Path, what: str) -> None:
    folder = cache(tmp_path / "cache")
    state = stream(folder).state_dict()
    add_round(folder, 1, sorted(stream(folder).keys))
    manifest = read_manifest(folder)
    old = [shard for shard in manifest.shards if shard.generation == 0]
    taken = old if what == "all" else old[:1]
    kept = tuple(shard for shard in manifest.shards if shard not in taken)
    write_manifest(folder, replace(manifest, shards=kept, pruned=tuple(taken)))
    update_index(folder)
    with pytest.raises(UserError, match=r"samples of generation 0.*been pruned.*g0000-000000\.tar.*24 hours"):
        stream(folder).load_state_dict(state)


def test_samples_that_come_late_to_a_generation_are_read_after_a_switch_only(tmp_path: Path) -> None:
    folder = grown(tmp_path / "cache")
    source = stream(folder)
    keys(source, 3)
    state = json.loads(json.dumps(source.state_dict()))
    rest = keys(source, 8)
    add_round(folder, 1, ["p2-00", "p8-00"], complete=False)
    resumed = stream(folder)
    assert len(resumed.keys) == 9
    resumed.load_state_dict(state)
    assert keys(resumed, 8) == rest
    resumed.switch(at(folder, 2))
    assert len(resumed.keys) == 9
    assert resumed.history == [[2, 11]]


def test_what_is_pruned_from_under_a_newer_view_does_not_touch_it(tmp_path: Path) -> None:
    folder = cache(tmp_path / "cache", per_shard=7)
    add_round(folder, 1, sorted(stream(folder).keys))
    state = stream(folder).state_dict()
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, shards=manifest.shards[1:], pruned=manifest.shards[:1]))
    resumed = stream(folder)
    resumed.load_state_dict(state)
    assert resumed.generation == 1
