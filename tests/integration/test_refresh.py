"""Refresh rounds end to end: what is asked again, when a new generation becomes data, and when an old one goes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from afd_data.cache import Summary, cache_teacher
from afd_data.config import (
    CacheConfig,
    DataConfig,
    PlaygroundConfig,
    PromptsConfig,
    RefreshConfig,
    StreamConfig,
    VideoConfig,
)
from afd_data.errors import UserError
from afd_data.examples import read_places
from afd_data.files import one_writer
from afd_data.inspection import verify
from afd_data.journal import JOURNAL, LOCK, Journal, Round, open_journal
from afd_data.leases import KEPT_S, Lease
from afd_data.margins import Margin, write_margins
from afd_data.origin import local_head
from afd_data.partition import Partition
from afd_data.prompts import Prompt, known_splits, load_prompts
from afd_data.pruning import prunable, prune, prune_held
from afd_data.resubmit import resubmit
from afd_data.shards import read_manifest, write_manifest
from afd_data.stream import Stream
from afd_data.teacher_config import FlawsConfig
from afd_data.teachers import FailedError, RefusedError, Teacher, open_teacher
from afd_data.teachers.playground import Playground

VIDEO = VideoConfig(frames=4, lossless=True)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
TRAIN = [f"p{n:04x}-00" for n in range(2, 8)]  # of `prompts()`
TEST = ["p0000-00", "p0001-00"]


def prompts(count: int = 8) -> list[Prompt]:
    """The first two test, the others train."""
    return [
        Prompt(f"p{n:04x}", f"a {COLOURS[n % 8]} ball falls, {n}", "train" if n > 1 else "test") for n in range(count)
    ]


def recipe(
    folder: Path, teacher: PlaygroundConfig | None = None, video: VideoConfig = VIDEO, seed: int = 0, **refresh: Any
) -> DataConfig:
    return DataConfig(
        out=str(folder),
        seed=seed,
        video=video,
        prompts=PromptsConfig(source="unused.txt"),
        teacher=teacher or PlaygroundConfig(),
        cache=CacheConfig(frozen=0.0, near_duplicate=-1, shard_samples=2, workers=1),
        refresh=RefreshConfig(**refresh),
    )


def run(
    config: DataConfig,
    wanted: Sequence[Prompt] | None = None,
    refresh: bool = True,
    teacher: Teacher | None = None,
    partition: Partition | None = None,
) -> Summary:
    teacher = teacher or open_teacher(config.teacher)
    wanted = prompts() if wanted is None else wanted
    return cache_teacher(config, list(wanted), Path(config.out) / "cache", teacher, False, refresh, partition)


def view(folder: Path, generation: int | None = None) -> dict[str, int]:
    """Key -> generation of its video in the view of a generation."""
    found: dict[str, int] = {}
    for split in read_manifest(folder).samples():
        places = read_places(folder, split, generation)
        found |= {key: place.shard.generation for key, place in places.items()}
    return found


def refreshed(folder: Path) -> list[str]:
    """Keys of the newest view that a refresh brought."""
    return sorted(key for key, generation in view(folder).items() if generation > 0)


def rounds(folder: Path) -> list[Round]:
    journal = open_journal(folder)
    try:
        return journal.rounds()
    finally:
        journal.close()


class Stubborn(Playground):
    """Takes no orders after the first `orders`; refuses, or fails at, prompts that contain a word."""

    def __init__(self, orders: int = 10**6, refuses: str = "never", fails: str = "never") -> None:
        super().__init__(PlaygroundConfig())
        self.orders, self.refuses, self.fails = orders, refuses, fails

    def submit(self, request):
        self.orders -= 1
        if self.orders < 0:
            raise UserError("no credit left")
        if self.refuses in request.prompt:
            raise RefusedError("not this one")
        if self.fails in request.prompt:
            raise FailedError("not today")
        return super().submit(request)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of 6 training and 2 test videos, in its first generation."""
    assert run(recipe(tmp_path), refresh=False).sealed == 8
    return tmp_path / "cache"


# What is asked again


def test_by_age_all_training_videos_come_again_and_no_test_video(cache: Path) -> None:
    assert run(recipe(cache.parent, older_than_days=0)).generation == 1
    assert refreshed(cache) == TRAIN
    assert view(cache).keys() == {*TRAIN, *TEST}
    assert rounds(cache)[1].why == {"older_than_days": 6}


def test_by_fraction_the_oldest_come_again_until_all_have(cache: Path) -> None:
    for generation, count in ((1, 3), (2, 6)):
        run(recipe(cache.parent, fraction=0.5))
        assert len(refreshed(cache)) == count
        assert read_manifest(cache).generation == generation


def test_by_margin_the_hardest_prompts_come_again_once(cache: Path) -> None:
    (cache.parent / "train").mkdir()
    rows = [Margin(key[:-3], float(number), 5, 1, 0) for number, key in enumerate(TRAIN)]
    write_margins(cache.parent / "train" / "margins.parquet", rows)
    config = recipe(cache.parent, hardest=0.3)
    run(config)
    assert refreshed(cache) == TRAIN[-2:]  # 0.3 x 6 prompts
    run(config)
    assert refreshed(cache) == TRAIN[-4:]  # those two have new videos, about which the margins say nothing


def test_without_margins_nothing_is_the_hardest_and_a_named_file_must_exist(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(recipe(cache.parent, hardest=0.5)).generation == 0
    assert "no margins yet" in caplog.text
    with pytest.raises(UserError, match="no margins"):
        run(recipe(cache.parent, hardest=0.5, margins=str(cache / "none.parquet")))


def test_another_teacher_setting_makes_all_training_videos_due_once(cache: Path) -> None:
    changed = recipe(cache.parent, teacher=PlaygroundConfig(flaws=FlawsConfig(drag=1.0)))
    assert run(changed).generation == 1
    assert refreshed(cache) == TRAIN
    assert run(changed).generation == 1
    assert run(changed, refresh=False).generation == 1


def test_new_prompts_of_any_split_come_in_a_refresh(cache: Path) -> None:
    new = [Prompt("p00aa", "a red square falls", "train"), Prompt("p00ab", "a blue square falls", "test")]
    run(recipe(cache.parent), [*prompts(), *new])
    assert refreshed(cache) == ["p00aa-00", "p00ab-00"]
    assert rounds(cache)[1].why == {"new_prompts": 2}


def test_a_plain_run_adds_to_the_first_round_until_a_refresh_has_begun_another(cache: Path) -> None:
    config = recipe(cache.parent, older_than_days=0)
    assert run(config, prompts(9), refresh=False).generation == 0
    run(config, prompts(9))
    summary = run(config, prompts(10), refresh=False)
    assert summary.generation == 2
    assert view(cache, 1).keys() == {*TEST, *TRAIN, "p0008-00"}  # a generation that trainers read stays as it is
    assert view(cache)["p0009-00"] == 2
    assert run(config, prompts(10), refresh=False).generation == 2


def test_a_prompt_that_left_the_source_keeps_its_video_and_is_not_asked_again(cache: Path) -> None:
    run(recipe(cache.parent, older_than_days=0), prompts(7))
    assert view(cache)["p0007-00"] == 0
    assert refreshed(cache) == TRAIN[:-1]


def test_where_nothing_is_due_no_round_begins(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "afd_data")
    assert run(recipe(cache.parent)).generation == 0
    assert "nothing is due" in caplog.text
    assert len(rounds(cache)) == 1


def test_a_new_round_draws_with_new_seeds_and_new_fingerprints(cache: Path) -> None:
    run(recipe(cache.parent, older_than_days=0))
    journal = open_journal(cache)
    [(seeds, fingerprints)] = journal.select(
        "SELECT count(DISTINCT seed), count(DISTINCT fingerprint) FROM samples WHERE split = 'train'"
    )
    journal.close()
    assert (seeds, fingerprints) == (12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"video": VIDEO.model_copy(update={"frames": 5})}, "video was"), ({"seed": 1}, "seed was 0, is now 1")],
)
def test_a_refresh_changes_neither_shape_nor_seed(cache: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*Set them back, or cache into another folder"):
        run(recipe(cache.parent, older_than_days=0, **change))


def test_another_teacher_without_refresh_is_told_of_it(cache: Path) -> None:
    with pytest.raises(UserError, match=r"settings was .* is now .*--refresh"):
        run(recipe(cache.parent, teacher=PlaygroundConfig(flaws=FlawsConfig(drag=1.0))), refresh=False)


def test_a_prompt_that_would_change_its_split_is_refused(cache: Path) -> None:
    moved = [Prompt(prompt.id, prompt.text, "train") for prompt in prompts()]
    with pytest.raises(UserError, match="was in test and is now in train"):
        run(recipe(cache.parent, older_than_days=0), moved)


def test_a_refused_video_leaves_the_old_one_in_view(cache: Path) -> None:
    run(recipe(cache.parent, older_than_days=0), teacher=Stubborn(refuses="blue"))
    assert view(cache)["p0002-00"] == 0
    assert refreshed(cache) == TRAIN[1:]


def test_what_failed_for_free_is_asked_again_by_the_next_refresh_and_by_no_other_run(cache: Path) -> None:
    wanted, failing = prompts(9), Stubborn(fails=", 8")
    config = recipe(cache.parent, older_than_days=0)
    run(config, wanted, refresh=False, teacher=failing)
    run(config, wanted, teacher=failing)  # round 1 asks for it too
    assert rounds(cache)[1].why == {"older_than_days": 6, "failed": 1}
    assert "p0008-00" not in view(cache)
    assert run(config, wanted, refresh=False).generation == 1
    assert "p0008-00" not in view(cache)  # a generation that trainers read stays as it is
    run(recipe(cache.parent), wanted)
    assert rounds(cache)[2].why == {"failed": 1}
    assert view(cache)["p0008-00"] == 2


def test_a_growing_source_keeps_what_was_held_out(tmp_path: Path) -> None:
    config = recipe(tmp_path, older_than_days=0)
    config = config.model_copy(update={"prompts": PromptsConfig(source="p.txt", test=3, near_duplicate=1.0)})
    texts = [f"a {colour} ball falls number {n}" for n, colour in enumerate(COLOURS)]
    for count in (6, 7, 8):
        (tmp_path / "p.txt").write_text("\n".join(texts[:count]))
        known = known_splits(tmp_path / "cache")
        found = load_prompts(config.prompts, tmp_path, None, known)
        run(config, found, refresh=count == 8)
        after = known_splits(tmp_path / "cache")
        assert known.items() <= after.items()
        assert sorted(after.values()).count("test") == 3
    assert read_manifest(tmp_path / "cache").generation == 1


# When it becomes data


def test_the_view_changes_only_when_the_whole_round_is_there(cache: Path) -> None:
    before = view(cache)
    with pytest.raises(UserError, match="no credit left"):
        run(recipe(cache.parent, older_than_days=0), teacher=Stubborn(orders=4))
    manifest = read_manifest(cache)
    assert manifest.generation == 0
    assert any(shard.generation == 1 for shard in manifest.shards)
    assert view(cache) == before
    run(recipe(cache.parent), refresh=False)
    assert read_manifest(cache).generation == 1
    assert refreshed(cache) == TRAIN


def test_the_same_refresh_after_a_crash_buys_what_was_missing_and_no_second_round(cache: Path) -> None:
    config, teacher = recipe(cache.parent, older_than_days=0), Stubborn(orders=4)
    with pytest.raises(UserError, match="no credit left"):
        run(config, teacher=teacher)
    teacher.orders = 100
    assert run(config, teacher=teacher).generation == 1
    assert teacher.orders == 100 - 2
    assert view(cache) == dict.fromkeys(TRAIN, 1) | dict.fromkeys(TEST, 0)
    assert run(config).generation == 2


def test_a_refresh_that_finds_the_first_round_going_on_finishes_that_alone(tmp_path: Path) -> None:
    config = recipe(tmp_path, older_than_days=0)
    with pytest.raises(UserError, match="no credit left"):
        run(config, refresh=False, teacher=Stubborn(orders=4))
    assert run(config).sealed == 8
    assert len(rounds(tmp_path / "cache")) == 1


def test_a_round_that_is_going_on_keeps_its_settings(cache: Path) -> None:
    with pytest.raises(UserError, match="no credit left"):
        run(recipe(cache.parent, older_than_days=0), teacher=Stubborn(orders=4))
    with pytest.raises(UserError, match="settings was"):
        run(recipe(cache.parent, teacher=PlaygroundConfig(flaws=FlawsConfig(drag=1.0))))


class Died(BaseException):
    pass


@pytest.mark.parametrize("moment", ["publication", "journal"])
def test_a_death_at_publication_is_repaired_by_the_next_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def write(folder, manifest):
        if manifest.generation == 1:
            raise Died
        write_manifest(folder, manifest)

    def finish(journal, generation):
        raise Died

    with monkeypatch.context() as patched:
        if moment == "publication":
            patched.setattr("afd_data.sealing.write_manifest", write)
        else:
            patched.setattr(Journal, "finish_round", finish)
        with pytest.raises(Died):
            run(recipe(cache.parent, older_than_days=0))
    assert read_manifest(cache).generation == (moment == "journal")
    assert rounds(cache)[1].finished_at == 0
    run(recipe(cache.parent, older_than_days=0))
    assert read_manifest(cache).generation == 1
    assert len(rounds(cache)) == 2
    assert rounds(cache)[1].finished_at > 0
    assert refreshed(cache) == TRAIN
    assert verify(cache) == []


# Children die at their n-th durable step (fsync, rename, unlink) of a refresh and a prune, for every third n there is.
# What they need is imported before they are forked.
DEATHS = """
import shutil
import sys
from pathlib import Path

import PIL.Image, pandas, pyarrow.parquet, webdataset.writer
from afd_data.pruning import prune
from tests.deaths import KILLED, Countdown, exit_code, fork
from tests.integration.test_refresh import prompts, recipe, rounds, run

root = Path(sys.argv[1])


def refresh(folder, days):
    run(recipe(folder, older_than_days=days), prompts(3))
    prune(folder / "cache", 1)


def dies_at(step, folder):
    Countdown(step)
    refresh(folder, 0)


assert exit_code(fork(lambda: run(recipe(root / "first"), prompts(3), refresh=False))) == 0
step, code = 0, KILLED
while code == KILLED:
    folder = root / f"step-{step:03d}"
    shutil.copytree(root / "first", folder)
    code = exit_code(fork(lambda: dies_at(step, folder)))
    known = rounds(folder / "cache")
    # The same command, unless it was done but for removing what is old.
    again = None if len(known) == 2 and known[1].finished_at else 0
    assert exit_code(fork(lambda: refresh(folder, again))) == 0, folder
    step += 3
assert code == 0
"""


@pytest.mark.slow  # a refresh twice for each of some 15 steps
def test_a_death_at_a_durable_step_of_a_refresh_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DEATHS, str(tmp_path)], check=True, timeout=300)
    folders = sorted(tmp_path.glob("step-*"))
    assert len(folders) > 10
    for folder in folders:
        cache = folder / "cache"
        assert set(view(cache).values()) == {0, 1}, folder
        assert read_manifest(cache).generation == 1, folder
        assert refreshed(cache) == TRAIN[:1], folder
        assert [shard.split for shard in read_manifest(cache).of("train", 0)] == [], folder
        assert verify(cache) == [], folder
        assert not list((cache / "spool").iterdir()), folder


# What was asked for long ago


def states_of(folder: Path, key: str) -> list[tuple[int, str]]:
    journal = open_journal(folder)
    try:
        return [(row.generation, row.state) for row in journal.rows() if row.key == key]
    finally:
        journal.close()


def test_what_an_older_round_lacks_is_ordered_again_by_a_refresh_only(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, config = prompts(9), recipe(cache.parent, fraction=0.5, new_prompts=False)
    run(config, wanted, refresh=False, teacher=Stubborn(refuses=", 8"))
    run(config, wanted)
    before = view(cache)
    assert resubmit(cache, keys=["p0008-00"], sure=True) == []
    assert "1 of these, such as p0008-00, belong to an older generation" in caplog.text
    run(config, wanted, refresh=False)
    assert view(cache) == before
    assert states_of(cache, "p0008-00") == [(0, "refused")]
    run(recipe(cache.parent), wanted)
    assert states_of(cache, "p0008-00") == [(0, "refused"), (2, "sealed")]
    assert view(cache) == before | {"p0008-00": 2}


def test_what_the_newest_round_lacks_is_ordered_again_in_it(cache: Path) -> None:
    config = recipe(cache.parent, older_than_days=0)
    run(config, teacher=Stubborn(refuses="blue"))
    assert resubmit(cache, keys=["p0002-00"], sure=True) == ["p0002-00"]
    run(config, refresh=False)
    assert view(cache)["p0002-00"] == 1


def test_a_cache_that_has_no_more_names_for_rounds_says_so_before_anything_is_asked(cache: Path) -> None:
    journal = Journal(cache / JOURNAL)
    journal.start_round(9999, journal.rounds()[0].facts, {})
    journal.finish_round(9999)
    journal.close()
    teacher = Stubborn()
    with pytest.raises(UserError, match=r"9999 refresh rounds.*another folder"):
        run(recipe(cache.parent, older_than_days=0), teacher=teacher)
    assert teacher.orders == 10**6
    assert len(rounds(cache)) == 2


# What goes


@pytest.fixture
def three(cache: Path) -> Path:
    """All training videos in three generations; those of the test prompts in the first alone."""
    for _ in range(2):
        run(recipe(cache.parent, older_than_days=0, keep_generations=9))
    assert read_manifest(cache).generation == 2
    return cache


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("data/*/*.tar")}


def test_what_no_kept_generation_shows_is_removed(three: Path) -> None:
    gone = prune(three, 2)
    assert {(shard.split, shard.generation) for shard in gone} == {("train", 0)}
    assert sum(shard.samples for shard in gone) == 6
    manifest = read_manifest(three)
    assert manifest.pruned == tuple(gone)
    assert files(three) == {shard.file for shard in manifest.shards}
    assert view(three, 1) == dict.fromkeys(TRAIN, 1) | dict.fromkeys(TEST, 0)
    assert prune(three, 2) == []
    assert verify(three) == []


def test_a_run_ends_by_removing_what_the_recipe_does_not_keep(cache: Path) -> None:
    summary = run(recipe(cache.parent, older_than_days=0, keep_generations=1))
    manifest = read_manifest(cache)
    assert {(shard.split, shard.generation) for shard in manifest.shards} == {("test", 0), ("train", 1)}
    assert summary.shards == len(manifest.shards) == len(files(cache))
    assert run(recipe(cache.parent), refresh=False).generation == 1
    assert verify(cache) == []


def test_a_shard_with_one_visible_sample_stays(cache: Path) -> None:
    run(recipe(cache.parent, fraction=0.5, keep_generations=9))
    gone = prune(cache, 1)
    visible = view(cache)
    assert len(visible) == 8
    assert sum(shard.samples for shard in gone) <= 3


def test_nothing_goes_while_a_trainer_reads_it(three: Path) -> None:
    lease = Lease(three, 0, "a/run")
    assert {shard.generation for shard in prune(three, 1)} == {1}
    assert len(view(three, 0)) == 8
    assert prunable(three, 1, now=time.time() + KEPT_S / 2) == []
    assert len(prunable(three, 1, now=time.time() + 2 * KEPT_S)) == 3
    lease.release()
    assert {shard.generation for shard in prune(three, 1)} == {0}


def test_what_a_late_video_hides_stays_while_a_trainer_reads_it(cache: Path) -> None:
    config = recipe(cache.parent, older_than_days=0, keep_generations=9)
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"shard_samples": 1})})
    run(config, teacher=Stubborn(refuses="blue"))
    read = Stream(cache, StreamConfig(), "train", 0)
    lease = Lease(cache, 1, "a/run", shards=read.shown)
    resubmit(cache, keys=["p0002-00"], sure=True)
    run(config, refresh=False)
    assert view(cache)["p0002-00"] == 1
    assert not {shard.file for shard in prune(cache, 1)} & {*read.shown}
    assert read.example("p0002-00").generation == 0
    lease.release()
    prune(cache, 1)
    with pytest.raises(UserError, match="been pruned"):
        Stream(cache, StreamConfig(), "train", 0, view=read.view, shown=read.shown)


def test_shards_of_a_round_that_goes_on_are_not_pruned(three: Path) -> None:
    with pytest.raises(UserError, match="no credit left"):
        run(recipe(three.parent, older_than_days=0, keep_generations=9), teacher=Stubborn(orders=4))
    assert 3 in {shard.generation for shard in read_manifest(three).shards}
    assert {shard.generation for shard in prune(three, 1)} == {0, 1}
    run(recipe(three.parent, keep_generations=9))
    assert set(view(three).values()) == {0, 3}


def test_a_dry_run_removes_nothing(three: Path) -> None:
    before = files(three)
    assert len(prune(three, 1, dry_run=True)) == 6
    assert files(three) == before
    assert read_manifest(three).pruned == ()


def test_a_death_between_manifest_and_tar_is_finished_by_the_next_run(three: Path) -> None:
    manifest = read_manifest(three)
    write_manifest(three, manifest.without(prunable(three, 2)))
    run(recipe(three.parent, keep_generations=9), refresh=False)
    assert files(three) == {shard.file for shard in read_manifest(three).shards}
    assert verify(three) == []


def test_a_name_that_was_pruned_is_not_given_again(three: Path) -> None:
    prune(three, 1)
    pruned = {shard.file for shard in read_manifest(three).pruned}
    assert read_manifest(three).next_file("train", 1) not in pruned


def test_tars_that_lie_elsewhere_go_there_too(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", older_than_days=0, keep_generations=9)
    config = config.model_copy(
        update={"cache": config.cache.model_copy(update={"storage": f"file://{tmp_path}/store"})}
    )
    run(config, refresh=False)
    run(config)
    gone = prune(tmp_path / "run" / "cache", 1)
    assert sum(shard.samples for shard in gone) == 6
    manifest = read_manifest(tmp_path / "store")
    assert manifest.pruned == tuple(gone)
    assert files(tmp_path / "store") == {shard.file for shard in manifest.shards}
    assert run(config, refresh=False).generation == 1


def test_a_copy_of_what_others_write_is_not_pruned(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="only they can prune it"):
        prune(local_head(f"file://{three}"), 1)


def test_a_cache_that_is_being_written_is_pruned_by_its_writer_only(three: Path) -> None:
    with one_writer(three / LOCK, "x"):
        with pytest.raises(UserError, match="another afd process"):
            prune(three, 1)
        assert len(prune_held(three, 1)) == 6


def test_a_folder_without_a_cache_is_not_pruned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        prune(tmp_path, 1)


# Shares of a round


def test_shares_of_a_refresh_ask_for_disjoint_samples_that_together_are_due(cache: Path) -> None:
    config, found = recipe(cache.parent, fraction=0.5), []
    for index in range(2):
        share = Partition(index, 2)
        run(config, partition=share)
        journal = Journal(share.folder(cache) / JOURNAL, writable=False)
        found += journal.select("SELECT generation, key FROM samples")
        journal.close()
        run(config, partition=share)  # finished: asks for nothing more
    assert len(found) == len(set(found)) == 3
    assert {generation for generation, _ in found} == {1}


def test_a_share_does_not_ask_for_what_the_cache_above_has(cache: Path) -> None:
    for index in range(2):
        share = Partition(index, 2)
        run(recipe(cache.parent), prompts(12), refresh=False, partition=share)
        assert len(known_splits(share.folder(cache))) == 2
