"""`cache_teacher` from prompts to shards: what ends where, what is asked again, what stock readers see."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from afd_data import inspection
from afd_data.cache import Summary, cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.index import index_path, read_index, schema, update_index
from afd_data.inspection import inspect, verify
from afd_data.journal import open_journal
from afd_data.prompts import Prompt
from afd_data.shards import read_manifest
from afd_data.status import status
from afd_data.teachers import Delivery, FailedError, Free, Identity, RefusedError, Teacher, open_teacher
from afd_data.video import write_mp4

VIDEO = VideoConfig(lossless=True)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


def recipe(seed: int = 0, video: VideoConfig = VIDEO, **cache) -> DataConfig:
    return DataConfig(
        out="unused",
        seed=seed,
        video=video,
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(**cache),
    )


def playground_prompts(count: int) -> list[Prompt]:
    """Every fourth prompt tests, the others train."""
    sizes = ("small", "large")
    return [
        Prompt(f"p{n:04d}", f"a {sizes[n % 2]} {COLOURS[n % 8]} ball falls, {n}", "train" if n % 4 else "test")
        for n in range(count)
    ]


def play(folder: Path, count: int = 8, **cache) -> Summary:
    config = recipe(**cache)
    return cache_teacher(config, playground_prompts(count), folder, open_teacher(config.teacher), progress=False)


def members(folder: Path) -> set[tuple[str, str, str]]:
    """(key, sha256 of the mp4, sha256 of the json) of everything that is sealed."""
    return {
        (row["key"], row["mp4_sha256"], row["json_sha256"])
        for split in read_manifest(folder).samples()
        for row in read_index(folder, split).to_pylist()
    }


class Drawn(Free):
    """A teacher that does what the prompt says, to see what becomes of it."""

    identity = Identity("drawn", "1", {})

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.healthy = False

    def prompts(self) -> list[str]:
        return []

    def submit(self, request):
        self.asked.append(request.prompt)
        if request.prompt == "refuse":
            raise RefusedError("not allowed here")
        return request.fingerprint

    def fetch(self, job_id, request, target):
        word = request.prompt.split()[0]
        if word == "fail" and not self.healthy:
            raise FailedError("the oven is cold")
        if word == "slow":
            time.sleep(0.3)
        if word == "junk":
            target.write_bytes(b"<html>not found</html>")
            return Delivery()
        video = request.video.model_copy(update={"frames": 5}) if word == "short" else request.video
        seed = int(request.prompt.split()[-1]) if word in ("same", "slow") else request.seed
        write_mp4(target, frozen(video) if word == "still" else drifting(video, seed), video)
        return Delivery(provenance={"word": word})


def frozen(video: VideoConfig) -> np.ndarray:
    return np.full((video.frames, video.height, video.width, 3), 90, np.uint8)


def drifting(video: VideoConfig, seed: int) -> np.ndarray:
    """Noise that moves one pixel to the right every frame."""
    picture = np.random.default_rng(seed).integers(0, 255, (video.height, video.width, 3), np.uint8)
    return np.stack([np.roll(picture, index, axis=1) for index in range(video.frames)])


def draw(folder: Path, *texts: str, teacher: Teacher | None = None, **cache) -> Summary:
    prompts = [Prompt(f"p{index}", text, "train") for index, text in enumerate(texts)]
    return cache_teacher(recipe(**cache), prompts, folder, teacher or Drawn(), progress=False)


def reasons(folder: Path) -> dict[str, str]:
    journal = open_journal(folder)
    try:
        return {row.prompt: row.reason for row in journal.rows()}
    finally:
        journal.close()


# The plain road


def test_every_prompt_becomes_its_takes_in_its_split(tmp_path):
    summary = play(tmp_path, 8, takes=2, eval_takes=1)
    assert summary.states == {"sealed": 14}  # 6 training prompts x 2 takes, 2 test prompts x 1
    assert read_manifest(tmp_path).samples() == {"train": 12, "test": 2}
    assert verify(tmp_path) == []


def test_nothing_but_the_contract_is_left_in_the_folder(tmp_path):
    play(tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        ".lock",
        "README.md",
        "contact-sheet.png",
        "data/test/g0000-000000.tar",
        "data/train/g0000-000000.tar",
        "index/test.parquet",
        "index/train.parquet",
        "journal.sqlite",
        "manifest.json",
    ]


def test_the_same_command_again_asks_for_nothing(tmp_path):
    teacher = Drawn()
    draw(tmp_path, "a", "b", teacher=teacher)
    before = (tmp_path / "manifest.json").read_bytes()
    summary = draw(tmp_path, "a", "b", teacher=teacher)
    assert sorted(teacher.asked) == ["a", "b"]
    assert summary.sealed == 2
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_same_recipe_gives_the_same_bytes_in_another_folder(tmp_path):
    play(tmp_path / "one", workers=1)
    play(tmp_path / "other", workers=4, shard_samples=2)
    assert members(tmp_path / "one") == members(tmp_path / "other")


def test_shards_are_cut_at_the_number_of_samples(tmp_path):
    draw(tmp_path, *"abcde", shard_samples=2)
    assert [shard.samples for shard in read_manifest(tmp_path).shards] == [2, 2, 1]


def test_shards_are_cut_at_their_size(tmp_path):
    draw(tmp_path, *"abc", shard_mb=1e-6)
    assert [shard.samples for shard in read_manifest(tmp_path).shards] == [1, 1, 1]


def test_more_prompts_and_takes_go_into_new_shards(tmp_path):
    play(tmp_path, 8)
    old = read_manifest(tmp_path).shards
    play(tmp_path, 12, takes=2)
    shards = read_manifest(tmp_path).shards
    assert shards[: len(old)] == old
    assert sum(shard.samples for shard in shards) == 9 * 2 + 3
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"video": VideoConfig(lossless=True, frames=13)}, "video was .*is now"),
        ({"frozen": 0.5}, "cache was .*is now"),
    ],
)
def test_another_recipe_is_told_to_use_another_folder(tmp_path, change, message):
    play(tmp_path)
    config = recipe(**change)
    with pytest.raises(UserError, match=f"{message}.*--set out=FOLDER"):
        cache_teacher(config, playground_prompts(8), tmp_path, open_teacher(config.teacher), progress=False)


def test_fewer_prompts_are_another_recipe(tmp_path):
    play(tmp_path, 8)
    with pytest.raises(UserError, match="2 differ"):
        play(tmp_path, 6)


def test_two_writers_are_refused(tmp_path):
    from afd_data.files import one_writer

    with one_writer(tmp_path / ".lock", "x"), pytest.raises(UserError, match="another afd process"):
        play(tmp_path)


# What is not taken


def test_what_is_not_taken_is_counted_with_its_reason(tmp_path):
    summary = draw(tmp_path, "good", "refuse", "fail", "junk", "short", "still", "same 7", "same as 7")
    assert summary.states == {"failed": 1, "refused": 1, "rejected": 4, "sealed": 2}
    assert summary.reasons == {
        "refused": 1,
        "failed": 1,
        "undecodable": 1,
        "wrong shape": 1,
        "frozen": 1,
        "near-duplicate": 1,
    }
    assert reasons(tmp_path)["refuse"] == "refused: not allowed here"
    assert reasons(tmp_path)["same as 7"] == "near-duplicate: shows the same as p6-00"
    assert "1 x near-duplicate" in summary.text()
    assert "near-duplicate: shows the same as p6-00" in status(tmp_path)


def test_of_two_twins_the_earlier_in_the_plan_stays_although_it_came_last(tmp_path):
    summary = draw(tmp_path, "slow 7", "same 7", workers=2, shard_samples=1)
    assert summary.states == {"rejected": 1, "sealed": 1}
    assert reasons(tmp_path)["same 7"] == "near-duplicate: shows the same as p0-00"


def test_a_twin_of_an_older_shard_is_found_by_a_later_run(tmp_path):
    draw(tmp_path, "same 7")
    assert draw(tmp_path, "same 7", "same as 7").states == {"rejected": 1, "sealed": 1}


def test_takes_of_one_prompt_may_be_alike(tmp_path):
    assert draw(tmp_path, "same 7", takes=2).states == {"sealed": 2}


def test_near_duplicates_can_be_allowed(tmp_path):
    assert draw(tmp_path, "same 7", "same as 7", near_duplicate=-1).states == {"sealed": 2}


def test_only_what_failed_is_asked_again(tmp_path):
    teacher = Drawn()
    texts = ("good", "refuse", "fail", "still")
    assert draw(tmp_path, *texts, teacher=teacher).states["failed"] == 1
    teacher.asked, teacher.healthy = [], True
    assert draw(tmp_path, *texts, teacher=teacher).states == {"refused": 1, "rejected": 1, "sealed": 2}
    assert teacher.asked == ["fail"]


def test_a_free_teachers_bug_is_not_swallowed(tmp_path):
    class Buggy(Drawn):
        def fetch(self, job_id, request, target):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw(tmp_path, "a", teacher=Buggy())
    assert draw(tmp_path, "a").states == {"sealed": 1}


# Stock readers


def test_datasets_streams_every_sample_with_declared_features(tmp_path):
    import datasets

    play(tmp_path, 8)
    stream = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    rows = list(stream.cast_column("mp4", datasets.Video(decode=False)))
    assert len(rows) == 6
    assert stream.features is not None
    assert stream.features["json"]["fps"] == datasets.Value("float64")
    expected = {row["key"]: row for row in read_index(tmp_path, "train").to_pylist()}
    for row in rows:
        data = (tmp_path / expected[row["__key__"]]["shard"]).read_bytes()
        start = expected[row["__key__"]]["mp4_offset"]
        assert row["mp4"]["bytes"] == data[start : start + expected[row["__key__"]]["mp4_size"]]
        assert row["json"]["cost"] == 0.0
        assert json.loads(row["json"]["world_json"])["bodies"]


def test_plain_webdataset_reads_the_cache(tmp_path):
    from webdataset.compat import WebDataset

    play(tmp_path, 8)
    shards = [str(tmp_path / shard.file) for shard in read_manifest(tmp_path).of("train")]
    rows = list(WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in rows] == [row["key"] for row in read_index(tmp_path, "train").to_pylist()]
    assert {key for row in rows for key in row if key[0] != "_"} == {"mp4", "json"}


# Looking at it


def test_the_index_can_be_thrown_away(tmp_path):
    play(tmp_path)
    before = read_index(tmp_path, "train")
    index_path(tmp_path, "train").unlink()
    assert [problem for problem in verify(tmp_path) if "no index" not in problem] == []
    with pytest.raises(UserError, match="no index"):
        read_index(tmp_path, "train")
    update_index(tmp_path)
    assert read_index(tmp_path, "train").equals(before)


def test_a_flipped_bit_anywhere_in_a_shard_is_found(tmp_path):
    play(tmp_path, 4)
    shard = tmp_path / "data/train/g0000-000000.tar"
    good = shard.read_bytes()
    row = read_index(tmp_path, "train").to_pylist()[0]
    places = {
        "a header's name": 2,
        "a header's time": 140,
        "the video": row["mp4_offset"] + row["mp4_size"] // 2,
        "the json": row["json_offset"] + 30,
        "the padding of a member": row["json_offset"] + row["json_size"],
        "the last byte": len(good) - 1,
    }
    for place, offset in places.items():
        bad = bytearray(good)
        bad[offset] ^= 1
        shard.write_bytes(bad)
        assert verify(tmp_path), place
    shard.write_bytes(good)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("file", ["manifest.json", "index/train.parquet"])
def test_a_changed_truth_is_found(tmp_path, file):
    play(tmp_path, 4)
    path = tmp_path / file
    data = path.read_bytes()
    sha = read_manifest(tmp_path).of("train")[0].sha256 if file == "manifest.json" else None
    key = sha.encode() if sha else b"p0001-00"
    at = data.index(key)
    path.write_bytes(data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :])
    assert verify(tmp_path)


def test_a_missing_shard_is_found_and_named(tmp_path):
    play(tmp_path, 4)
    (tmp_path / "data/train/g0000-000000.tar").unlink()
    assert any("g0000-000000.tar" in problem for problem in verify(tmp_path))
    with pytest.raises(UserError, match="named in the manifest and gone"):
        play(tmp_path, 4)


def test_a_tar_that_somebody_put_there_is_refused(tmp_path):
    play(tmp_path, 4)
    shard = tmp_path / "data/train/g0000-000000.tar"
    (shard.parent / "g0000-000001.tar").write_bytes(shard.read_bytes())
    assert any("g0000-000001.tar: not named in the manifest" in problem for problem in verify(tmp_path))
    with pytest.raises(UserError, match="the manifest does not name it"):
        play(tmp_path, 4)


def test_verify_does_not_take_a_run_that_ends_meanwhile_for_damage(tmp_path, monkeypatch):
    play(tmp_path, 4)
    shard_rows = inspection.shard_rows

    def rows_while_another_run_seals(folder, shard):
        monkeypatch.setattr(inspection, "shard_rows", shard_rows)
        play(tmp_path, 6)
        return shard_rows(folder, shard)

    monkeypatch.setattr(inspection, "shard_rows", rows_while_another_run_seals)
    assert verify(tmp_path) == []
    assert sum(read_manifest(tmp_path).samples().values()) == 6


def test_a_shard_that_cannot_be_read_is_one_problem_of_several(tmp_path, monkeypatch):
    play(tmp_path, 4, shard_samples=2)
    describe_shard = inspection.describe_shard

    def describe(folder, file):
        if file.endswith("000000.tar"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return describe_shard(folder, file)

    monkeypatch.setattr(inspection, "describe_shard", describe)
    (tmp_path / "data/train/g0000-000001.tar").unlink()
    problems = verify(tmp_path)
    assert f"{tmp_path}/data/train/g0000-000000.tar: cannot be read (Input/output error)" in problems
    assert f"{tmp_path}/data/train/g0000-000001.tar: cannot be read (No such file or directory)" in problems


def test_inspect_tells_provenance_and_draws_a_contact_sheet(tmp_path):
    from PIL import Image

    play(tmp_path / "cache", 8)
    text = inspect(tmp_path / "cache", tmp_path / "sheet.png")
    assert "8 samples" in text
    assert "teacher playground version 1" in text
    assert "16x16, 12 frames at 8 fps: 8" in text
    assert "8 prompts, 12 s" in text  # 8 x 12 / 8
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 100
        assert len(sheet.convert("RGB").getcolors(10**6) or []) > 10


def change_index(folder: Path, **columns) -> None:
    rows = [row | columns for row in read_index(folder, "train").to_pylist()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema()), index_path(folder, "train"))


def test_inspect_survives_a_time_that_no_calendar_has(tmp_path):
    play(tmp_path, 4)
    change_index(tmp_path, created_at=1e300)
    assert "to 1e+300 s after 1970" in inspect(tmp_path)


def test_inspect_reads_nothing_outside_a_shard(tmp_path):
    play(tmp_path, 4)
    change_index(tmp_path, mp4_size=2**62)
    with pytest.raises(UserError, match=r"g0000-000000\.tar: the index puts p0001-00\.mp4 at \d+ with 4"):
        inspect(tmp_path, tmp_path / "sheet.png")


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    for look in (status, inspect):
        with pytest.raises(UserError, match=str(tmp_path)):
            look(tmp_path)
    assert verify(tmp_path)


# Interruptions

RUN = """
import sys
from pathlib import Path
from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.prompts import Prompt
from afd_data.teachers import open_teacher

folder, side, frames, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
recipe = DataConfig(
    out="unused", prompts=PromptsConfig(source="unused.txt"), teacher=PlaygroundConfig(),
    video=VideoConfig(width=side, height=side, frames=frames, lossless=True), cache=CacheConfig(shard_samples=1000),
)
prompts = [Prompt(f"p{n:04d}", f"a red ball falls, {n}", "train") for n in range(count)]
print("start", flush=True)
try:
    print(cache_teacher(recipe, prompts, folder, open_teacher(recipe.teacher), progress=False).text())
except ValueError as error:
    sys.exit(f"user error: {error}")
"""


def run(folder: Path, side: int, frames: int, count: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(folder), str(side), str(frames), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_finishes(tmp_path):
    process = run(tmp_path, 16, 12, 120)
    assert process.stdout is not None
    assert process.stdout.readline() == "start\n"
    wait_for(lambda: len(list((tmp_path / "spool").glob("*.json"))) >= 5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode in (130, -signal.SIGINT), stderr
    journal = open_journal(tmp_path)
    states = journal.counts()
    journal.close()
    assert states.keys() == {"planned", "spooled"}  # nothing hangs in between
    assert states["spooled"] >= 5
    assert run(tmp_path, 16, 12, 120).wait(timeout=300) == 0
    assert verify(tmp_path) == []
    assert read_manifest(tmp_path).samples() == {"train": 120}


def wait_for(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_is_an_error_in_words_and_nothing_is_lost(tmp_path):
    # No file may grow beyond 200 kB: every spooled video fits (6 kB), the tar of all 40 does not.
    limit = 200_000

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = run(tmp_path, 64, 8, 40, preexec_fn=small_disk)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "user error: " in stderr
    assert "no room left" in stderr
    assert "run the same command again" in stderr
    assert not list(tmp_path.rglob("*.tar"))
    before = {path.name: os.stat(path).st_mtime_ns for path in (tmp_path / "spool").glob("*.mp4")}
    assert before
    process = run(tmp_path, 64, 8, 40)
    assert process.wait(timeout=300) == 0
    assert verify(tmp_path) == []
    created = {row["key"]: row["created_at"] for row in read_index(tmp_path, "train").to_pylist()}
    assert len(created) == 40
    kept = {name[6:-4]: time_ns // 10**9 for name, time_ns in before.items() if not name.endswith(".part.mp4")}
    assert all(created[key] == seconds for key, seconds in kept.items())  # not asked for a second time
