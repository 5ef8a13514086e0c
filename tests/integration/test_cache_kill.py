"""Processes that die with -9: nothing is lost, nothing is doubled, nothing paid is asked for twice."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from afd_data.index import read_index
from afd_data.inspection import verify
from afd_data.journal import open_journal
from afd_data.shards import read_manifest

CACHE = """
import sys
from pathlib import Path

import webdataset.writer
from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.prompts import Prompt
from afd_data.teachers import open_teacher

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


def cache(folder, count, shard_samples):
    recipe = DataConfig(
        out="unused",
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        video=VideoConfig(lossless=True),
        cache=CacheConfig(shard_samples=shard_samples),
    )
    prompts = [
        Prompt(f"p{n:04d}", f"a {COLOURS[n % 8]} ball falls, {n}", "train" if n % 5 else "test") for n in range(count)
    ]
    return cache_teacher(recipe, prompts, Path(folder), open_teacher(recipe.teacher), progress=False)
"""

# The stage runs in forked children, so that 20 deaths do not cost 20 starts of Python.
CHILDREN = (
    CACHE
    + """
import os
import random
import signal
import time

import pyarrow.parquet
from tests.deaths import KILLED, Countdown, exit_code, fork
"""
)

RANDOM_KILLS = (
    CHILDREN
    + """
root, count, wanted_kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def run(name):
    return fork(lambda: cache(root / name, count, 8))


begin = time.monotonic()
assert exit_code(run("unbroken")) == 0
longest_s = (time.monotonic() - begin) / 4
kills, folder = 0, 0
while kills < wanted_kills:
    pid = run(f"broken-{folder}")
    time.sleep(random.uniform(0.0, longest_s))
    os.kill(pid, signal.SIGKILL)
    if exit_code(pid) == KILLED:
        kills += 1
        longest_s *= 1.1
    else:  # it had finished: go on in a new folder, and kill sooner
        folder += 1
        longest_s /= 2
for number in range(folder + 1):
    assert exit_code(run(f"broken-{number}")) == 0
"""
)

# Children die at their n-th durable step (fsync, rename, unlink), for every n there is.
EVERY_STEP = (
    CHILDREN
    + """
root, count = Path(sys.argv[1]), int(sys.argv[2])


def dies_at(step, folder):
    Countdown(step)
    cache(folder, count, 2)


step, code = 0, KILLED
while code == KILLED:
    folder = root / f"step-{step:03d}"
    code = exit_code(fork(lambda: dies_at(step, folder)))
    assert exit_code(fork(lambda: cache(folder, count, 2))) == 0
    step += 1
assert code == 0
"""
)

# A paid teacher: every accepted job is a line on disk, written before the answer goes back.
PAID = """
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.prompts import Prompt
from afd_data.teachers import Delivery, Free, Identity, Progress
from afd_data.video import write_mp4

folder, accepted, dies_in = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


class Paid(Free):
    identity = Identity("paid", "1", {}, paid=True)

    def prompts(self):
        return []

    def submit(self, request):
        with open(accepted, "a") as file:
            file.write(json.dumps({"prompt": request.prompt, "fingerprint": request.fingerprint}) + "\\n")
            file.flush()
            os.fsync(file.fileno())
        self.dies("submit", request)
        if request.prompt == "dropped":
            raise ConnectionResetError("connection reset by peer")
        return f"job-of-{request.prompt}"

    def poll(self, job_id):
        if job_id.endswith("second"):
            self.dies("poll", None)
        return Progress("ready")

    def fetch(self, job_id, request, target):
        assert job_id == f"job-of-{request.prompt}"
        self.dies("fetch", request)
        picture = np.random.default_rng(request.seed).integers(0, 255, (16, 16, 3), np.uint8)
        write_mp4(target, np.stack([np.roll(picture, n, axis=1) for n in range(12)]), request.video)
        return Delivery(cost=0.25)

    def dies(self, step, request):
        if step == dies_in and (request is None or request.prompt == "second"):
            os.kill(os.getpid(), signal.SIGKILL)


recipe = DataConfig(
    out="unused", prompts=PromptsConfig(source="unused.txt"), teacher=PlaygroundConfig(),
    video=VideoConfig(lossless=True), cache=CacheConfig(workers=1),
)
prompts = [Prompt(f"p{n}", text, "train") for n, text in enumerate(sys.argv[4:])]
summary = cache_teacher(recipe, prompts, folder, Paid(), progress=False)
print(json.dumps({"states": summary.states, "reasons": summary.reasons}))
"""


def members(folder: Path) -> list[tuple[str, str, str]]:
    """(key, sha256 of the mp4, sha256 of the json) of everything that is sealed, sorted: doubles would show."""
    return sorted(
        (row["key"], row["mp4_sha256"], row["json_sha256"])
        for split in read_manifest(folder).samples()
        for row in read_index(folder, split).to_pylist()
    )


def python(script: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> str:
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return stdout


def check_equal(folders: list[Path], expected: list[tuple[str, str, str]]) -> None:
    for folder in folders:
        assert members(folder) == expected, folder
        assert verify(folder) == [], folder
        assert not list((folder / "spool").iterdir()), folder


@pytest.mark.slow  # the stage runs more than 20 times
def test_twenty_kills_at_random_moments_end_like_an_unbroken_run(tmp_path):
    finished(python(RANDOM_KILLS, tmp_path, 100, 20))
    expected = members(tmp_path / "unbroken")
    assert len(expected) == 100
    check_equal(sorted(tmp_path.glob("broken-*")), expected)


@pytest.mark.slow  # the stage runs twice for each of some 40 steps
def test_a_death_at_any_durable_step_ends_like_an_unbroken_run(tmp_path):
    finished(python(EVERY_STEP, tmp_path, 2))
    folders = sorted(tmp_path.glob("step-*"))
    assert len(folders) > 25
    expected = members(folders[-1])  # its countdown outlasted the run
    assert len(expected) == 2
    check_equal(folders, expected)


def paid(tmp_path: Path, dies_in: str, *prompts: str) -> subprocess.Popen:
    return python(PAID, tmp_path / "cache", tmp_path / "accepted", dies_in, *prompts)


def accepted(tmp_path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in (tmp_path / "accepted").read_text().splitlines()]


def test_a_paid_request_that_was_cut_off_is_unknown_and_never_asked_again(tmp_path):
    first = paid(tmp_path, "submit", "first", "second", "third")
    first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL
    assert accepted(tmp_path) == ["first", "second"]
    for _ in range(2):
        result = json.loads(finished(paid(tmp_path, "never", "first", "second", "third")))
        assert result["states"] == {"sealed": 2, "unknown": 1}
        assert result["reasons"] == {"no answer": 1}
        assert accepted(tmp_path) == ["first", "second", "third"]


@pytest.mark.parametrize("step", ["poll", "fetch"])
def test_a_paid_job_with_an_id_is_fetched_by_the_next_process(tmp_path, step):
    first = paid(tmp_path, step, "first", "second", "third")
    first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL
    result = json.loads(finished(paid(tmp_path, "never", "first", "second", "third")))
    assert result["states"] == {"sealed": 3}
    assert accepted(tmp_path) == ["first", "second", "third"]
    journal = open_journal(tmp_path / "cache")
    assert journal.select("SELECT count(*), sum(cost), currency FROM requests") == [(3, 0.75, "USD")]
    journal.close()


def test_a_paid_request_whose_connection_dropped_is_unknown_and_the_others_go_on(tmp_path):
    for _ in range(2):
        result = json.loads(finished(paid(tmp_path, "never", "first", "dropped", "third")))
        assert result["states"] == {"sealed": 2, "unknown": 1}
    assert accepted(tmp_path) == ["first", "dropped", "third"]
