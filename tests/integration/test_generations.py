"""Training on a cache that gets new generations meanwhile: never half a round, and exact after a kill at any time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, StreamConfig
from afd_data.errors import UserError
from afd_data.examples import Example, read_places
from afd_data.files import one_writer
from afd_data.journal import LOCK
from afd_data.leases import KEPT_S, live_generations, live_shards
from afd_data.margins import MARGINS, read_rows
from afd_data.origin import local_head
from afd_data.prompts import Prompt
from afd_data.pruning import prune
from afd_data.shards import read_manifest
from afd_data.stream import Stream
from afd_train import trainer
from afd_train.config import Recipe, TrainConfig
from afd_train.objective_config import AfdConfig, FlowMatchingConfig
from afd_train.runlog import read_metrics
from afd_train.runs import stream_folder, train_folder
from afd_train.trainer import train
from tests.conftest import COLOURS, VIDEO
from tests.hub_server import HubServer, connect
from tests.integration.test_refresh import Stubborn
from tests.rounds import complete_round, half_round

BOOKS: dict[str, Any] = {
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "save_every_steps": 2,
    "keep_checkpoints": 2,
    "validate_every_steps": 3,
    "validation_prompts": 2,
}
FLOW = TrainConfig(objective=FlowMatchingConfig(), steps=6, **BOOKS)
AFD = TrainConfig(objective=AfdConfig(), steps=8, held_out_per_step=1, **BOOKS)


class KilledError(Exception):
    """Stands for a kill at this point."""


OTHER_RUNS = shutil.ignore_patterns("leases")  # of other tests, on the cache that all share


@pytest.fixture
def cache(playground_cache: Path, tmp_path: Path) -> Path:
    """A cache of the test's own: 12 training and 4 validation prompts."""
    return Path(shutil.copytree(playground_cache, tmp_path / "cache", ignore=OTHER_RUNS))


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    def make(cache: Path | str, config: TrainConfig, out: str = "run", follow: bool = True, **sections: Any) -> Recipe:
        stream = StreamConfig(folder=str(cache), follow=follow)
        return tiny_recipe(tmp_path / out, train=config, stream=stream, **sections)

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Example]]:
    """(split, generation that the stream reads, example) of everything that any stream hands out."""
    seen: list[tuple[str, int, Example]] = []
    next_batch = Stream.next_batch

    def watched(self: Stream, size: int) -> list[Example]:
        batch = next_batch(self, size)
        seen.extend((self.split, self.generation, example) for example in batch)
        return batch

    monkeypatch.setattr(Stream, "next_batch", watched)
    return seen


Moments = dict[int | str, Callable[[], object]]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Moments:
    """See `at_moments`."""
    return at_moments(monkeypatch)


def at_moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    """`at[3] = action`: done once step 3 is logged, in every run; "before", "after": the checkpoint of a switch."""
    actions: Moments = {}
    log, save = trainer.Trainer._log, trainer.save_checkpoint

    def logged(self: trainer.Trainer, step: int, *what: Any) -> None:
        log(self, step, *what)
        actions.get(step, lambda: None)()

    def saved(folder: Path, parts: Any, state: dict, processes: Any) -> None:
        switched = state["step"] > 0 and state["data"]["generations"][-1][0] == state["step"]
        if switched:
            actions.get("before", lambda: None)()
        save(folder, parts, state, processes)
        if switched:
            actions.get("after", lambda: None)()

    monkeypatch.setattr(trainer.Trainer, "_log", logged)
    monkeypatch.setattr(trainer, "save_checkpoint", saved)
    return actions


def add_round(folder: Path, generation: int) -> None:
    """Round 1 replaces every second training video and one validation video, round 2 the others; each has new prompts.

    Nothing happens where the cache has it already.
    """
    if read_manifest(folder).generation >= generation:
        return
    keys = sorted(read_places(folder, "train"))
    half_round(folder, "train", keys[generation % 2 :: 2], [f"A ball of round {generation} is dropped."])
    validation = sorted(read_places(folder, "validation"))
    half_round(folder, "validation", validation[:1], [f"A red ball of round {generation} is dropped."])
    complete_round(folder)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that a run leaves but clocks and TensorBoard's time-stamped files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != ".lock" and "tensorboard" not in name and not name.endswith("timings.jsonl"):
            found[name] = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', path.read_bytes())
    return found


def state_of(recipe: Recipe, step: int) -> dict:
    return json.loads((train_folder(recipe) / f"checkpoints/step-{step:06d}/state.json").read_text())


def margins_file(recipe: Recipe) -> Path:
    return train_folder(recipe) / MARGINS


def generations(recipe: Recipe) -> list[int]:
    """Of steps 0, 1, 2, ..."""
    rows = read_metrics(train_folder(recipe) / "metrics.jsonl")
    return [int(row["data/generation"]) for row in rows if row["step"] >= 0]


def test_a_run_goes_over_when_a_checkpoint_is_saved_and_the_checkpoint_says_so(cache, recipe_of, at, drawn):
    recipe = recipe_of(cache, FLOW)
    at[2] = lambda: add_round(cache, 1)
    train(recipe)
    assert generations(recipe) == [0, 0, 0, 0, 1, 1]
    data = state_of(recipe, 4)["data"]
    assert data["generations"] == [[0, 0], [4, 1]]
    assert (data["train"]["view"]["generation"], data["train"]["drawn"], data["train"]["history"]) == (1, 0, [[0, 8]])
    assert all(example.generation == 0 for split, view, example in drawn if view == 0)
    newest = {key: place.shard.generation for key, place in read_places(cache, "train").items()}
    late = [example for split, view, example in drawn if view == 1]
    assert [example.generation for example in late] == [newest[example.key] for example in late]


def test_a_run_that_does_not_follow_stays_with_its_generation(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW, follow=False)
    at[2] = lambda: add_round(cache, 1)
    train(recipe)
    assert generations(recipe) == [0] * 6


def grows(at: Moments, cache: Path) -> None:
    """Round 1 is complete after step 2, round 2 after step 5, whether or not the step is done again."""
    at.clear()
    at[2] = lambda: add_round(cache, 1)
    at[5] = lambda: add_round(cache, 2)


def killed_once(at: Moments, moment: int | str) -> None:
    """After whatever else is to be done there."""
    other = at.pop(moment, lambda: None)

    def kill() -> None:
        at[moment] = other
        other()
        raise KilledError

    at[moment] = kill


@pytest.fixture(scope="module")
def unbroken(tiny_recipe, playground_cache, tmp_path_factory) -> Recipe:
    """AFD while the cache grows twice."""
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copytree(playground_cache, folder / "cache", ignore=OTHER_RUNS)
    recipe = tiny_recipe(folder / "run", train=AFD, stream=StreamConfig(folder=str(folder / "cache")))
    with pytest.MonkeyPatch.context() as patch:
        at = at_moments(patch)
        grows(at, folder / "cache")
        train(recipe)
    return recipe


def test_a_run_goes_over_as_often_as_the_cache_grows(unbroken):
    assert generations(unbroken) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert state_of(unbroken, 8)["data"]["generations"] == [[0, 0], [4, 1], [6, 2]]


@pytest.mark.parametrize("moment", [1, 3, "before", "after", 4, 6])
def test_a_run_killed_at_any_time_equals_an_unbroken_one(unbroken, cache, recipe_of, at, moment):
    recipe = recipe_of(cache, AFD)
    grows(at, cache)
    killed_once(at, moment)
    with pytest.raises(KilledError):
        train(recipe)
    train(recipe)
    assert files(train_folder(recipe)) == files(train_folder(unbroken))


def test_a_run_resumed_on_a_cache_with_newer_generations_goes_on_with_its_own_first(unbroken, cache, recipe_of, at):
    recipe = recipe_of(cache, AFD)
    at[2] = lambda: add_round(cache, 1)
    at[4] = lambda: add_round(cache, 2)  # one step earlier than for the unbroken run, and before the same checkpoint
    killed_once(at, 4)
    with pytest.raises(KilledError):
        train(recipe)
    train(recipe)
    assert generations(recipe) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert files(train_folder(recipe)) == files(train_folder(unbroken))


def test_margins_of_all_prompts_that_were_drawn_are_left_for_a_refresh(unbroken):
    rows = read_rows(margins_file(unbroken))
    known = {place.prompt_id for place in read_places(stream_folder(unbroken), "train").values()}
    assert sum(row.count for row in rows) == 8 * 2  # steps, prompts of each
    assert max(row.step for row in rows) == 7
    assert {row.generation for row in rows} <= {0, 1, 2}
    assert {row.prompt_id for row in rows} <= known


def test_the_margin_of_a_first_step_is_the_logged_one(cache, recipe_of):
    recipe = recipe_of(cache, AFD.model_copy(update={"steps": 1}))
    train(recipe)
    (row,) = [row for row in read_metrics(train_folder(recipe) / "metrics.jsonl") if row["step"] == 0]
    margins = [row.margin for row in read_rows(margins_file(recipe))]
    assert len(margins) == 2
    assert sum(margins) / 2 == pytest.approx(row["discriminator/clean_margin"], rel=1e-5)


def test_a_killed_run_can_be_resumed_until_its_lease_is_over(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW.model_copy(update={"steps": 5, "save_every_steps": 3}))
    for moment in (0, 1):
        killed_once(at, moment)
        with pytest.raises(KilledError):
            train(recipe)
    replace_everything(cache)
    assert prune(cache, keep_generations=1) == []
    killed_once(at, 3)
    with pytest.raises(KilledError):  # from the checkpoint of step 0, and beyond that of step 3
        train(recipe)
    assert generations(recipe)[:3] == [0, 0, 0]


def test_a_view_that_was_pruned_cannot_be_gone_on_with(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW)
    killed_once(at, 3)
    with pytest.raises(KilledError):
        train(recipe)
    replace_everything(cache)
    assert prune(cache, keep_generations=1, now=time.time() + KEPT_S + 1)
    with pytest.raises(UserError, match=r"samples of generation 0.*been pruned.*Train into a new folder"):
        train(recipe)


def test_a_phase_that_is_done_needs_its_generation_no_more(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW, pretrain=(FLOW.model_copy(update={"steps": 2}),))
    at[1] = lambda: replace_everything(cache)  # after the last step of the first phase
    killed_once(at, 3)
    with pytest.raises(KilledError):
        train(recipe)
    assert live_generations(cache) == {1}
    prune(cache, keep_generations=1)
    train(recipe)
    assert generations(recipe) == [1] * 6


def replace_everything(folder: Path) -> None:
    """A round of all videos, once."""
    if read_manifest(folder).generation == 0:
        for split in ("train", "validation"):
            half_round(folder, split, sorted(read_places(folder, split)))
        complete_round(folder)


def test_a_run_holds_what_its_checkpoints_read_and_lets_go_in_the_end(cache, recipe_of, at):
    recipe, held = recipe_of(cache, AFD), {}
    grows(at, cache)
    for step in (1, 3, 4, 6):
        before = at.get(step, lambda: None)
        at[step] = lambda step=step, before=before: (before(), held.update({step: live_generations(cache)}))
    train(recipe)
    # keep_checkpoints is 2: at step 4 those of steps 2 and 4 are there, at step 6 those of steps 4 and 6.
    assert held == {1: {0}, 3: {0}, 4: {0, 1}, 6: {1, 2}}
    assert live_generations(cache) == set()


def add_late(folder: Path) -> None:
    """A new prompt of the first generation, once."""
    if len(read_places(folder, "train")) == 12:
        half_round(folder, "train", [], ["A late ball is dropped."], late=True)


def test_samples_that_come_late_to_a_generation_are_gone_over_to_as_exactly(cache, recipe_of, at, tmp_path):
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    alone, broken = recipe_of(cache, FLOW, "alone"), recipe_of(other, FLOW, "broken")
    at[2] = lambda: add_late(cache)
    train(alone)
    assert state_of(alone, 6)["data"]["generations"] == [[0, 0], [4, 0]]
    at[2] = lambda: add_late(other)
    killed_once(at, 3)
    with pytest.raises(KilledError):
        train(broken)
    train(broken)
    assert files(train_folder(broken)) == files(train_folder(alone))


def test_nothing_late_is_gone_over_to_while_somebody_writes_to_the_cache(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW.model_copy(update={"steps": 8}))
    with ExitStack() as writing:
        writing.enter_context(one_writer(cache / LOCK, "x"))
        at[2] = lambda: add_late(cache)
        at[4] = writing.close
        train(recipe)
    assert state_of(recipe, 8)["data"]["generations"] == [[0, 0], [6, 0]]


def make_first_round(folder: Path, orders: int) -> None:
    """Ask for so many of 16 videos more, 2 in a shard."""
    texts = [f"A {colour} ball is {verb}." for colour in COLOURS for verb in ("dropped", "thrown to the right")]
    prompts = [Prompt(f"p{n:04x}", text, "train" if n % 4 else "validation") for n, text in enumerate(texts)]
    recipe = DataConfig(
        out=str(folder),
        video=VIDEO,
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(frozen=0.0, near_duplicate=-1, shard_samples=2, workers=1),
    )
    with suppress(UserError):
        cache_teacher(recipe, prompts, folder, Stubborn(orders=orders), progress=False)


def test_a_run_on_half_a_first_round_says_so_and_goes_over_to_the_whole_one(tmp_path, recipe_of, at, caplog):
    folder = tmp_path / "cache"
    make_first_round(folder, 8)
    recipe, half = recipe_of(folder, FLOW), len(read_places(folder, "train"))
    at[1] = lambda: make_first_round(folder, 4)  # still half
    at[3] = lambda: make_first_round(folder, 16)
    train(recipe)
    assert half < 12
    assert f"holds {half} training samples so far, and its first generation is still being made" in caplog.text
    assert state_of(recipe, 6)["data"]["generations"] == [[0, 0], [4, 0]]
    views = [state_of(recipe, step)["data"]["train"]["view"]["shards"] for step in (4, 6)]
    assert views == [[shard.file for shard in read_manifest(folder).of("train")]] * 2
    assert len(read_places(folder, "train")) == 12


def test_no_other_run_speaks_of_half_a_round(cache, recipe_of, caplog):
    train(recipe_of(cache, FLOW.model_copy(update={"steps": 1})))
    assert "still being made" not in caplog.text


def test_a_start_that_fails_leaves_no_lease(cache, recipe_of):
    for tar in cache.glob("data/train/*.tar"):
        tar.write_bytes(bytes(255 - byte for byte in tar.read_bytes()))
    with pytest.raises(UserError, match="not what was sealed"):
        train(recipe_of(cache, AFD))
    assert live_generations(cache) == set()


def test_a_resumed_run_holds_what_its_older_checkpoints_read(cache, recipe_of, at):
    recipe, held = recipe_of(cache, FLOW), []
    grows(at, cache)
    at[4] = lambda: held.append((live_generations(cache), live_shards(cache)))
    killed_once(at, 4)
    with pytest.raises(KilledError):
        train(recipe)
    train(recipe)
    assert [generations for generations, _ in held] == [{0, 1}, {0, 1}]
    assert held[0] == held[1]


def push(hub: HubServer, cache: Path) -> str:
    """What is in the cache now, and nothing else, as a commit; returns the address."""
    now = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    if ("datasets", "alice/clips") in hub.repos:
        repo = hub.repos["datasets", "alice/clips"]
        repo.commit({}, "all goes")
    hub.add("alice/clips", now, kind="datasets")
    return "hf://datasets/alice/clips"


def test_a_run_reads_on_at_its_commit_whatever_others_push_and_fetch(cache, recipe_of, at, hub, tmp_path, monkeypatch):
    local = recipe_of(Path(shutil.copytree(cache, tmp_path / "local")), FLOW, "local")
    train(local)
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    recipe = recipe_of(push(hub, cache), FLOW, follow=False)

    def prune_and_push() -> None:
        replace_everything(cache)
        prune(cache, keep_generations=1)
        local_head(push(hub, cache))

    at[2] = prune_and_push
    killed_once(at, 3)
    with pytest.raises(KilledError):
        train(recipe)
    shutil.rmtree(tmp_path / "home" / "samples")
    train(recipe)
    remote, here = (files(train_folder(each)) for each in (recipe, local))
    commits = re.compile(rb'"commit": [^\n]*')
    assert {name: commits.sub(b"", data) for name, data in remote.items()} == {
        name: commits.sub(b"", data) for name, data in here.items()
    }


def test_a_hub_that_cannot_be_reached_at_a_checkpoint_ends_no_training(
    cache, recipe_of, at, hub, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    url = push(hub, cache)
    for split in ("train", "validation"):
        with Stream(local_head(url), StreamConfig(), split, 0) as source:
            source.next_batch(len(source.keys))  # kept on the disk
    recipe = recipe_of(url, FLOW)
    at[0] = lambda: connect("http://127.0.0.1:9", tmp_path / "gone", monkeypatch)
    train(recipe)
    assert generations(recipe) == [0] * 6
    assert caplog.text.count("not looked for a newer generation") == 2  # steps 2 and 4


def test_a_killed_run_keeps_its_lease(cache, recipe_of, at):
    recipe = recipe_of(cache, FLOW)
    killed_once(at, 3)
    with pytest.raises(KilledError):
        train(recipe)
    assert live_generations(cache) == {0}
    train(recipe)
    assert live_generations(cache) == set()


def test_a_remote_cache_trains_the_same_student_and_is_followed_too(
    unbroken, cache, recipe_of, at, tmp_path, monkeypatch
):
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "home"))
    recipe = recipe_of(f"file://{cache}", AFD)
    grows(at, cache)
    train(recipe)
    assert files(train_folder(recipe)) == files(train_folder(unbroken))
    assert live_generations(cache) == set()
    assert stream_folder(recipe).is_relative_to(tmp_path / "home")


def test_a_trainer_running_on_the_cache_meanwhile_never_sees_half_a_round(cache, recipe_of, drawn, at):
    settings = {"steps": 100_000, "save_every_steps": 1, "validate_every_steps": 100_000}
    recipe = recipe_of(cache, FLOW.model_copy(update=settings))
    refreshed = threading.Event()

    def stop() -> None:
        if refreshed.is_set():
            raise KilledError

    at |= dict.fromkeys(range(100_000), stop)
    refresh = threading.Thread(target=lambda: (refresh_slowly(cache, recipe, drawn), refreshed.set()))
    refresh.start()
    with pytest.raises(KilledError):
        train(recipe)
    refresh.join()
    assert sorted(set(generations(recipe))) == [0, 1, 2]
    of_keys = {view: {k: p.shard.generation for k, p in read_places(cache, "train", view).items()} for view in range(3)}
    assert all(example.generation == of_keys[view][example.key] for _, view, example in drawn)
    assert {example.generation for _, view, example in drawn if view == 2} == {1, 2}


def refresh_slowly(cache: Path, recipe: Recipe, drawn: list) -> None:
    """Two rounds, shard by shard, each completed a while after half of it was named."""

    def wait(view: int, batches: int) -> None:
        """Until the trainer has drawn so much more of this view."""
        goal, deadline = len(drawn) + 2 * batches, time.monotonic() + 60
        while (len(drawn) < goal or drawn[-1][1] != view) and time.monotonic() < deadline:
            time.sleep(0.005)

    for generation in (1, 2):
        keys = sorted(read_places(cache, "train"))
        wait(generation - 1, 3)
        half_round(cache, "train", keys[::2] if generation == 1 else keys[1:6])
        wait(generation - 1, 3)
        half_round(cache, "train", keys[1::2] if generation == 1 else keys[6:9])
        wait(generation - 1, 3)
        complete_round(cache)
        wait(generation, 8)


TWO = """
import os, sys
from pathlib import Path
from afd_train import trainer
from afd_train.recipe import load_recipe
from tests.integration.test_generations import add_round

log = trainer.Trainer._log
def logged(self, step, *what):
    log(self, step, *what)
    if step == 2 and self.processes.main:
        add_round(Path(sys.argv[2]), 1)
    self.processes.wait()
trainer.Trainer._log = logged
trainer.train(load_recipe(sys.argv[1]))
"""


@pytest.mark.slow  # two processes import torch and diffusers
def test_two_processes_go_over_together_and_know_all_margins(cache, recipe_of, at, tmp_path):
    two = Path(shutil.copytree(cache, tmp_path / "two-cache"))
    config = AFD.model_copy(update={"held_out_per_step": 2})  # two processes share them
    alone, together = recipe_of(cache, config, "one"), recipe_of(two, config, "two")
    at[2] = lambda: add_round(cache, 1)
    train(alone)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(together.model_dump(mode="json")))
    (tmp_path / "two.py").write_text(TWO)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    arguments = ["--rdzv-endpoint", "localhost:0", tmp_path / "two.py", tmp_path / "recipe.yaml", two]
    command = [sys.executable, *launch, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert generations(together) == generations(alone) == [0] * 4 + [1] * 4
    assert state_of(together, 8)["data"] == state_of(alone, 8)["data"]
    pairs = list(zip(*(read_rows(margins_file(recipe)) for recipe in (alone, together)), strict=True))
    assert all(replace(one, margin=0) == replace(other, margin=0) for one, other in pairs)
    assert [one.margin for one, _ in pairs] == pytest.approx([other.margin for _, other in pairs], abs=1e-3)
