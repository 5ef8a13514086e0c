"""Caches that become one: parts of a plan, caches made apart, and what is refused; deaths in the middle."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from afd_data.cache import cache_teacher
from afd_data.config import RefreshConfig
from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.inspection import verify
from afd_data.journal import JOURNAL, LOCK, Journal, open_journal
from afd_data.merging import merge
from afd_data.origin import set_origin
from afd_data.partition import MERGE, Partition, parts_of
from afd_data.prompts import Prompt
from afd_data.shards import read_manifest
from afd_data.teachers import Identity, UnreachableError, open_teacher
from tests.parts import TWINS, members, play, play_parts, prompts, recipe, states

PLAN = prompts(10)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "cache"
    play(folder, PLAN)
    return folder


def test_merged_parts_hold_what_an_unbroken_run_holds(plain, tmp_path):
    parts = play_parts(tmp_path, PLAN)
    assert sum(len(members(part)) for part in parts) == 10  # both twins are there
    merged = merge(parts, tmp_path, near_duplicate=0, move=True)
    assert members(tmp_path) == members(plain)
    assert states(tmp_path) == states(plain)
    assert list(states(tmp_path)) == list(states(plain))  # in the order of the plan
    assert (merged.added, merged.twins) == (9, 1)
    assert verify(tmp_path) == []
    assert not (tmp_path / "parts").exists()


def test_a_merged_cache_goes_on_as_a_plain_one(plain, tmp_path):
    merge(play_parts(tmp_path, PLAN), tmp_path, near_duplicate=0, move=True)
    before = read_manifest(tmp_path)
    summary = play(tmp_path, PLAN)
    assert summary.states == {"rejected": 1, "sealed": 9}
    assert read_manifest(tmp_path) == before  # nothing was asked for again


def test_prompts_added_to_a_merged_cache_are_the_only_ones_asked_for(tmp_path):
    merge(play_parts(tmp_path, PLAN), tmp_path, near_duplicate=0, move=True)
    more = prompts(14)
    play(tmp_path, more)
    assert verify(tmp_path) == []
    assert len(members(tmp_path)) == 13
    assert set(states(tmp_path)) == {f"{prompt.id}-00" for prompt in more}


def test_merging_twice_changes_nothing(tmp_path):
    parts = play_parts(tmp_path, PLAN)
    merge(parts, tmp_path, near_duplicate=0)
    before, journal = read_manifest(tmp_path), _journal(tmp_path)
    merged = merge(parts, tmp_path, near_duplicate=0)
    assert merged.added == 0
    assert read_manifest(tmp_path) == before
    assert _journal(tmp_path) == journal


def test_whole_tars_are_linked_and_sources_stay(tmp_path):
    play(tmp_path / "one", PLAN)
    merge([tmp_path / "one"], tmp_path / "out", near_duplicate=0)
    for shard in read_manifest(tmp_path / "out").shards:
        assert (tmp_path / "out" / shard.file).stat().st_nlink == 2
    assert verify(tmp_path / "one") == []


def test_caches_of_other_prompts_and_seeds_become_one(tmp_path):
    first, second = prompts(6), [prompt for prompt in prompts(6, first=50) if prompt not in TWINS]
    play(tmp_path / "one", first)
    play(tmp_path / "two", second, config=recipe(seed=5))
    merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", near_duplicate=0)
    assert members(tmp_path / "out") == sorted(members(tmp_path / "one") + members(tmp_path / "two"))
    assert verify(tmp_path / "out") == []


def test_caches_without_journals_find_their_twins_in_the_videos(plain, tmp_path):
    parts = play_parts(tmp_path / "cache", PLAN)
    for part in parts:
        (part / JOURNAL).unlink()
    merge(parts, tmp_path / "out", near_duplicate=0)
    assert members(tmp_path / "out") == members(plain)
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_a_cache_without_a_journal_joins_one_that_has_it(plain, tmp_path):
    parts = play_parts(tmp_path / "cache", PLAN)
    (parts[1] / JOURNAL).unlink()
    merge(parts, tmp_path / "out", near_duplicate=0)
    assert states(tmp_path / "out") == states(plain)
    assert _journal(tmp_path / "out", "SELECT key, seed, fingerprint FROM samples") == _journal(
        plain, "SELECT key, seed, fingerprint FROM samples"
    )
    assert play(tmp_path / "out", PLAN).states == {"rejected": 1, "sealed": 9}


def test_a_cache_without_near_duplicates_decision_keeps_both_twins(tmp_path):
    merge(play_parts(tmp_path, PLAN), tmp_path, near_duplicate=-1, move=True)
    assert len(members(tmp_path)) == 10


class Slow:
    """A paid teacher whose jobs are not ready before `open` is set."""

    identity = Identity("slow", "1", {}, paid=True)

    def __init__(self, ready: bool) -> None:
        self.asked: list[str] = []
        self._ready = ready
        self._inner = open_teacher(recipe().teacher)

    def prompts(self) -> list[str]:
        return []

    def estimate(self, video) -> float:
        return 0.5

    def turn(self, stop) -> bool:
        return True

    def submit(self, request) -> str:
        self.asked.append(request.prompt)
        return f"job-{request.prompt_id}"

    def poll(self, job_id):
        if not self._ready and job_id != "job-p0050":
            raise UnreachableError("not now")
        return self._inner.poll(job_id)

    def fetch(self, job_id, request, target):
        return self._inner.fetch(request.fingerprint, request, target)


def test_running_jobs_and_their_costs_go_on_in_the_merged_cache(tmp_path):
    teacher = Slow(ready=False)
    for index in range(3):
        cache_teacher(recipe(), PLAN, tmp_path, teacher, progress=False, partition=Partition(index, 3))
    assert len(teacher.asked) == 10
    merge(parts_of(tmp_path), tmp_path, near_duplicate=0, move=True)
    journal = open_journal(tmp_path)
    assert journal.counts()["submitted"] == 9
    assert journal.spend() == {"USD": (0.5, 4.5)}
    journal.close()
    later = Slow(ready=True)
    summary = cache_teacher(recipe(), PLAN, tmp_path, later, progress=False)
    assert later.asked == []
    assert summary.states == {"rejected": 1, "sealed": 9}


def test_what_waits_in_a_spool_is_brought_along(tmp_path):
    teacher = Slow(ready=False)
    cache_teacher(recipe(), [PLAN[0], TWINS[1]], tmp_path / "one", teacher, progress=False)
    journal = open_journal(tmp_path / "one")
    assert sorted(journal.counts()) == ["spooled", "submitted"]
    journal.close()
    merge([tmp_path / "one"], tmp_path / "out", near_duplicate=0)
    summary = cache_teacher(recipe(), [PLAN[0], TWINS[1]], tmp_path / "out", Slow(ready=True), progress=False)
    assert summary.states == {"sealed": 2}


def refresh(folder: Path, partition: Partition | None = None) -> None:
    config = recipe().model_copy(update={"refresh": RefreshConfig(fraction=1.0)})
    teacher = open_teacher(config.teacher)
    cache_teacher(config, PLAN, folder, teacher, progress=False, refresh=True, partition=partition)


def test_a_refresh_round_in_parts_is_that_of_a_plain_run_and_never_half(plain, tmp_path):
    one, parted = tmp_path / "one", tmp_path / "parted"
    shutil.copytree(plain, one)
    shutil.copytree(plain, parted)
    refresh(one)
    for index in range(3):
        refresh(parted, Partition(index, 3))
    with pytest.raises(UserError, match="part 2 of 3 of refresh round 1 is missing"):
        merge(parts_of(parted)[:2], parted, near_duplicate=0)
    merge(parts_of(parted), parted, near_duplicate=0, move=True)
    assert read_manifest(parted).generation == 1
    assert members(parted) == members(one)
    assert states(parted) == states(one)
    assert verify(parted) == []


def test_parts_add_to_a_cache_only_what_it_lacks(plain, tmp_path):
    one, parted, more = tmp_path / "one", tmp_path / "parted", prompts(14)
    shutil.copytree(plain, one)
    shutil.copytree(plain, parted)
    play(one, more)
    parts = play_parts(parted, more)
    assert sum(len(states(part)) for part in parts) == 4
    merge(parts, parted, near_duplicate=0, move=True)
    assert members(parted) == members(one)
    assert play(parted, more).states == {"rejected": 1, "sealed": 13}


def test_tars_go_to_where_the_merged_cache_keeps_its_own(plain, tmp_path):
    cache, place = tmp_path / "cache", tmp_path / "place"
    parts = play_parts(cache, PLAN)
    set_origin(cache, f"file://{place}")
    merge(parts, cache, near_duplicate=0, move=True)
    assert not list(cache.glob("data/*/*.tar"))
    assert len(list(place.glob("data/*/*.tar"))) == len(read_manifest(place).shards) > 0
    assert members(place) == members(plain)
    assert play(cache, PLAN, config=recipe(storage=f"file://{place}")).states == {"rejected": 1, "sealed": 9}


# What is refused


def test_different_videos_of_one_sample_are_refused(tmp_path):
    play(tmp_path / "one", PLAN)
    play(tmp_path / "two", PLAN, config=recipe(seed=5))
    with pytest.raises(UserError, match=r"one and .*two hold different videos of generation 0"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", near_duplicate=0)


def test_a_prompt_in_two_splits_is_refused(tmp_path):
    play(tmp_path / "one", [Prompt("p01", "a red ball falls", "train")])
    play(tmp_path / "two", [Prompt("p01", "a red ball falls", "test")])
    with pytest.raises(UserError, match=r"different splits \(train, test\)|different splits \(test, train\)"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", near_duplicate=0)


def test_other_shapes_are_refused(tmp_path):
    config = recipe()
    play(tmp_path / "one", PLAN[:2])
    longer = config.model_copy(update={"video": config.video.model_copy(update={"frames": 13})})
    play(tmp_path / "two", PLAN[2:4], config=longer)
    with pytest.raises(UserError, match="13 frames at 8 fps"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out", near_duplicate=0)


def test_a_refresh_round_that_goes_on_is_refused(tmp_path):
    play(tmp_path / "one", PLAN[:2])
    journal = Journal(tmp_path / "one" / JOURNAL)
    journal.start_round(1, journal.rounds()[0].facts, {})
    journal.close()
    with pytest.raises(UserError, match="a refresh round goes on"):
        merge([tmp_path / "one"], tmp_path / "out", near_duplicate=0)


def test_a_second_writer_is_refused(tmp_path):
    play(tmp_path / "one", PLAN[:2])
    with one_writer(tmp_path / "one" / LOCK, "a run"), pytest.raises(UserError, match="another afd process"):
        merge([tmp_path / "one"], tmp_path / "out", near_duplicate=0)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="no cache"):
        merge([tmp_path / "nothing"], tmp_path / "out", near_duplicate=0)


def test_a_damaged_tar_is_refused(tmp_path):
    play(tmp_path / "one", PLAN[:2])
    tar = next((tmp_path / "one").glob("data/*/*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match="damaged"):
        merge([tmp_path / "one"], tmp_path / "out", near_duplicate=0)
    assert not (tmp_path / "out" / MERGE).exists()
    assert not list((tmp_path / "out").glob("data/*/*.tar"))


@pytest.mark.parametrize("kind", ["mp4", "json"])
def test_a_member_that_is_not_what_was_sealed_is_refused_before_it_is_read(tmp_path, kind):
    parts = play_parts(tmp_path / "cache", PLAN)  # two of its videos are twins, so both are looked at
    for part in parts:
        (part / JOURNAL).unlink()
        for path in part.glob("data/*/*.tar"):
            with tarfile.open(path) as tar, path.open("r+b") as file:
                for member in tar:
                    if member.name.endswith(kind):
                        file.seek(member.offset_data + member.size // 2)
                        file.write(bytes(4))
                        file.flush()
    with pytest.raises(UserError, match=rf"\.{kind} is not what was sealed"):
        merge(parts, tmp_path / "out", near_duplicate=0)


def test_a_cache_with_a_broken_merge_takes_no_run(tmp_path):
    play(tmp_path, PLAN[:2])
    (tmp_path / MERGE).write_text("[]")
    with pytest.raises(UserError, match="merge into it was broken off"):
        play(tmp_path, PLAN[:2])


# Deaths

# Children die at their n-th durable step, for every n there is; each then merges again.
EVERY_STEP = """
import shutil
import sys
from pathlib import Path

from afd_data.merging import merge
from afd_data.partition import parts_of
from tests.deaths import KILLED, Countdown, exit_code, fork

root, source = Path(sys.argv[1]), Path(sys.argv[2])


def dies_at(step, cache):
    Countdown(step)
    merge(parts_of(cache), cache, 0, move=True)


shutil.copytree(source, root / "unbroken")
merge(parts_of(root / "unbroken"), root / "unbroken", 0, move=True)  # and children need not import again
step, code = 0, KILLED
while code == KILLED:
    cache = root / f"step-{step:03d}"
    shutil.copytree(source, cache)
    code = exit_code(fork(lambda: dies_at(step, cache)))
    if parts_of(cache):
        assert exit_code(fork(lambda: merge(parts_of(cache), cache, 0, move=True))) == 0
    step += 1
assert code == 0
"""


@pytest.mark.slow  # one merge for each of some 60 steps
def test_a_death_at_any_durable_step_of_a_merge_ends_like_an_unbroken_run(tmp_path):
    plan, plain, source = prompts(5), tmp_path / "plain", tmp_path / "source"
    play(plain, plan)
    play_parts(source, plan)
    command = [sys.executable, "-c", EVERY_STEP, str(tmp_path / "deaths"), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    folders = sorted((tmp_path / "deaths").iterdir())
    assert len(folders) > 30
    for folder in folders:
        assert members(folder) == members(plain), folder
        assert verify(folder) == [], folder
        assert parts_of(folder) == [], folder
        assert not (folder / MERGE).exists(), folder
        assert states(folder) == states(plain), folder
        assert _journal(folder, "SELECT count(*), sum(cost) FROM requests") == [(5, 0.0)], folder


def _journal(folder: Path, query: str = "SELECT * FROM samples") -> list[tuple]:
    journal = open_journal(folder)
    try:
        return sorted(journal.select(query))
    finally:
        journal.close()
