"""`afd train` on a real small cache: the three objectives, resumption, and what it says when it cannot go on."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from afd_data.config import PromptsConfig, StreamConfig
from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.stream import Example, Stream
from afd_data.video import probe
from afd_train.config import Recipe, TrainConfig
from afd_train.objective_config import AfdConfig, DistilConfig, FlowMatchingConfig
from afd_train.runlog import read_metrics
from afd_train.runs import train_folder
from afd_train.students.folder import open_student
from afd_train.trainer import train

BOOKS: dict[str, Any] = {
    "prompts_per_step": 3,
    "rollouts_per_prompt": 2,
    "save_every_steps": 2,
    "validate_every_steps": 3,
    "validation_prompts": 2,
    "held_out_per_step": 2,
    "warmup_steps": 2,
}
PRETRAIN = (
    TrainConfig(objective=FlowMatchingConfig(), steps=4, learning_rate=2e-3, **BOOKS),
    TrainConfig(objective=DistilConfig(), steps=3, learning_rate=1e-4, **BOOKS),
)
EVERY_STEP: dict[str, Any] = BOOKS | {"save_every_steps": 1, "keep_checkpoints": 9}
AFD = TrainConfig(objective=AfdConfig(), steps=5, learning_rate=1e-4, **EVERY_STEP)


def changed(config: TrainConfig, **settings) -> TrainConfig:
    return TrainConfig(**(dict(config) | settings))


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on where it was interrupted; clocks are taken out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name == ".lock" or "tensorboard" in name or name.endswith("timings.jsonl"):
            continue
        content = path.read_bytes()
        if path.name == "state.json":
            content = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', content)
        found[name] = content
    return found


@pytest.fixture(scope="module")
def unbroken(tiny_recipe, tmp_path_factory) -> Recipe:
    """Flow matching, distillation and AFD in one go."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("unbroken"), pretrain=PRETRAIN, train=AFD)
    assert train(recipe) == train_folder(recipe)
    return recipe


@pytest.fixture
def copy(unbroken, tmp_path) -> Recipe:
    """That run in a folder of the test's own."""
    shutil.copytree(unbroken.out, tmp_path / "run")
    return unbroken.model_copy(update={"out": str(tmp_path / "run")})


def test_every_phase_leaves_its_log_students_checkpoints_and_strips(unbroken):
    folder = train_folder(unbroken)
    for phase, steps in ((folder / "pretrain-0", 4), (folder / "pretrain-1", 3), (folder, 5)):
        assert [row["step"] for row in read_metrics(phase / "metrics.jsonl") if row["step"] >= 0] == list(range(steps))
        assert {path.name for path in (phase / "students").iterdir()} == {"base", "student", "ema", "best"}
        assert (phase / "checkpoints" / f"step-{steps:06d}" / "state.json").is_file()
        assert (phase / "validation" / f"step-{steps:06d}.mp4").is_file()
        assert list((phase / "tensorboard").glob("events.*"))


def test_old_checkpoints_are_deleted(unbroken):
    def kept(phase: str) -> list[str]:
        return sorted(path.name for path in (train_folder(unbroken) / phase / "checkpoints").iterdir())

    assert kept("pretrain-0") == ["step-000002", "step-000004"]
    assert kept(".") == [f"step-{step:06d}" for step in range(6)]


def test_a_phase_starts_from_the_averaged_student_of_the_one_before(unbroken):
    folder = train_folder(unbroken)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    for before, after in (("pretrain-0", "pretrain-1"), ("pretrain-1", ".")):
        ema, base = folder / before / "students/ema" / weights, folder / after / "students/base" / weights
        assert ema.read_bytes() == base.read_bytes()


def test_the_average_differs_from_the_student_and_both_from_the_base(unbroken):
    nets = [open_student(train_folder(unbroken) / "students" / name).net for name in ("base", "student", "ema")]
    base, student, ema = (np.concatenate([p.detach().numpy().ravel() for p in net.parameters()]) for net in nets)
    assert 0 < np.abs(ema - base).max() < np.abs(student - base).max()


def test_the_warm_up_is_logged_below_step_0(unbroken):
    rows = read_metrics(train_folder(unbroken) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [-2, -1, 0, 1, 2, 3, 4]
    assert all("discriminator/held_out_accuracy" in row for row in rows)


def test_validation_measures_exact_physics_and_shows_the_same_prompts_side_by_side(unbroken):
    folder = train_folder(unbroken)
    rows = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "validation/object_permanence" in row] == [2, 4]
    shown = probe(folder / "validation" / "step-000005.mp4")
    assert (shown.width, shown.height, shown.frames) == (2 * 96, 96, 4)


def test_the_clock_is_kept_out_of_the_metrics(unbroken):
    folder = train_folder(unbroken)
    assert not any("seconds" in key for row in read_metrics(folder / "metrics.jsonl") for key in row)
    parts = {"seconds/rollout", "seconds/discriminator", "seconds/update", "seconds/data"}
    assert parts <= read_metrics(folder / "timings.jsonl")[-1].keys()


def test_the_same_command_again_changes_nothing(copy):
    folder = train_folder(copy)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = times()
    train(copy)
    assert times() == before


def test_two_trainings_in_one_folder_are_refused(copy):
    folder = train_folder(copy)
    with one_writer(folder / ".lock", "this test"), pytest.raises(UserError, match="another afd process"):
        train(copy)


def forget_after(phase: Path, step: int) -> None:
    """Leave a finished phase as a kill after the checkpoint of `step` would: its log may have got further."""
    for path in (phase / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    with (phase / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "student/lo')
    shutil.rmtree(phase / "students" / "ema")
    (phase / "checkpoints" / f"step-{step + 1:06d}.part").mkdir()


@pytest.mark.parametrize(
    ("phase", "step"), [("pretrain-0", 2), ("pretrain-1", 0), ("pretrain-1", 2), (".", 0), (".", 2), (".", 4)]
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(copy, phase, step):
    folder = train_folder(copy)
    expected = files(folder)
    forget_after(folder / phase, step)
    if phase != ".":
        for later in ("checkpoints", "students", "validation", "metrics.jsonl"):
            target = folder / later
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    train(copy)
    assert files(folder) == expected


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(copy):
    folder = train_folder(copy)
    expected = files(folder)
    shutil.rmtree(folder / "checkpoints")
    train(copy)
    assert files(folder) == expected


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(copy):
    folder = train_folder(copy)
    before = (folder / "metrics.jsonl").read_bytes()
    train(copy.model_copy(update={"train": changed(AFD, steps=6)}))
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 5


def test_fewer_steps_than_are_done_are_refused(copy):
    with pytest.raises(UserError, match=r"is at step 5, beyond train\.steps=3"):
        train(copy.model_copy(update={"train": changed(AFD, steps=3)}))


@pytest.mark.parametrize(
    ("section", "settings", "named"),
    [
        ("train", {"learning_rate": 0.5}, r"train\.learning_rate"),
        ("train", {"objective": AfdConfig(policy_mix=0.5)}, r"train\.objective"),
        ("discriminator", {"input_noise": 0.0}, "discriminator"),
        ("student", {"shift": 3.0}, "student"),
    ],
)
def test_another_recipe_on_an_old_run_is_refused(copy, section, settings, named):
    before = files(train_folder(copy))
    other = getattr(copy, section).model_copy(update=settings)
    # Without the phases before, which would object first; so it also starts from other weights.
    with pytest.raises(
        UserError, match=rf"holds a run of another recipe \({named}, starting weights differ\).*out=FOLDER"
    ):
        train(copy.model_copy(update={section: other, "pretrain": ()}))
    assert files(train_folder(copy)) == before


def test_a_run_whose_starting_student_was_trained_on_is_refused(copy):
    longer = tuple(changed(phase, steps=phase.steps + 1) for phase in PRETRAIN)
    with pytest.raises(UserError, match=r"another recipe \(starting weights differ\)"):
        train(copy.model_copy(update={"pretrain": longer}))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(copy):
    folder = train_folder(copy)
    expected = files(folder)
    damaged = folder / "checkpoints" / "step-000005" / "discriminator.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-000005/discriminator\.safetensors: missing, or its sha256.*Delete"):
        train(copy)
    shutil.rmtree(damaged.parent)  # as the message says
    train(copy)
    assert files(folder) == expected


@pytest.mark.parametrize("objective", [FlowMatchingConfig(), AfdConfig(), DistilConfig()], ids=lambda o: o.name)
def test_a_run_that_diverges_stops_with_a_diagnosis_and_an_intact_checkpoint(tiny_recipe, tmp_path, objective):
    books: dict[str, Any] = BOOKS | {"warmup_steps": 0, "save_every_steps": 1}
    wild = TrainConfig(objective=objective, steps=50, learning_rate=1e30, max_grad_norm=1e30, **books)
    recipe = tiny_recipe(tmp_path, train=wild)
    with pytest.raises(UserError, match=r"step \d+: \S+ is (nan|-?inf).*last checkpoint is intact"):
        train(recipe)
    newest = max((train_folder(recipe) / "checkpoints").glob("step-*"))
    assert all(
        np.isfinite(tensor).all() for path in newest.glob("*.safetensors") for tensor in load_file(path).values()
    )
    with pytest.raises(UserError, match="last checkpoint is intact"):
        train(recipe)  # which loads it and fares the same


def test_a_time_budget_ends_a_run_early_and_for_good(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=changed(PRETRAIN[0], seconds=1e-6))
    folder = train(recipe)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [0]
    assert (folder / "students" / "ema" / "student.json").is_file()
    before = files(folder)
    train(recipe)
    assert files(folder) == before


def seconds_of(checkpoint: Path) -> float:
    return json.loads((checkpoint / "state.json").read_text())["seconds"]


def test_a_warm_up_counts_towards_the_time_budget(unbroken):
    folder = train_folder(unbroken)
    rows = [row for row in read_metrics(folder / "timings.jsonl") if row["step"] < 0]
    parts = sum(value for row in rows for key, value in row.items() if key.startswith("seconds/"))
    assert 0 < parts <= seconds_of(folder / "checkpoints" / "step-000000") + 1e-3  # parts are rounded to 1e-4


def test_a_warm_up_that_uses_the_time_up_is_followed_by_one_step_also_after_a_kill(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=changed(AFD, seconds=1e-6))
    folder = train(recipe)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [-2, -1, 0]
    expected = files(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000001")
    train(recipe)
    assert files(folder) == expected


def test_the_clock_of_the_cpu_does_not_count_what_a_run_waits_for(tiny_recipe, tmp_path, monkeypatch):
    def slow(self: Stream, count: int) -> list[Example]:
        time.sleep(0.5)
        return plain(self, count)

    plain = Stream.next_batch
    monkeypatch.setattr(Stream, "next_batch", slow)
    spent = {}
    for clock in ("wall", "cpu"):
        folder = train(tiny_recipe(tmp_path / clock, train=changed(PRETRAIN[0], steps=2, clock=clock)))
        spent[clock] = seconds_of(folder / "checkpoints" / "step-000002")
    assert spent["wall"] > 1.0  # two steps that wait for half a second each
    assert 0 < spent["cpu"] < spent["wall"] - 0.5


def test_a_run_goes_on_by_another_clock(copy):
    folder = train_folder(copy)
    expected = files(folder)
    forget_after(folder, 4)
    train(copy.model_copy(update={"train": changed(AFD, clock="cpu")}))
    assert files(folder) == expected


def test_decoding_workers_change_nothing(tiny_recipe, playground_cache, tmp_path):
    logs = []
    for workers in (0, 1):
        stream = StreamConfig(folder=str(playground_cache), workers=workers)
        folder = train(tiny_recipe(tmp_path / str(workers), train=PRETRAIN[0], stream=stream))
        logs.append((folder / "metrics.jsonl").read_bytes())
    assert logs[0] == logs[1]


def test_without_a_cache_the_command_that_makes_one_is_named(tiny_recipe, tmp_path):
    with pytest.raises(UserError, match="cache-teacher"):
        train(tiny_recipe(tmp_path, train=AFD, stream=StreamConfig(folder=str(tmp_path / "nowhere"))))


def test_a_cache_of_other_videos_is_refused(tiny_recipe, unbroken, tmp_path):
    video = unbroken.video.model_copy(update={"frames": 6})
    with pytest.raises(UserError, match="frames"):
        train(tiny_recipe(tmp_path, train=AFD, video=video))


def test_a_run_starts_from_the_student_that_the_recipe_names(tiny_recipe, unbroken, tmp_path):
    init = train_folder(unbroken) / "students" / "student"
    recipe = tiny_recipe(tmp_path, student={"init": str(init)}, train=changed(PRETRAIN[0], steps=1))
    train(recipe)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (train_folder(recipe) / "students/base" / weights).read_bytes() == (init / weights).read_bytes()


def test_a_student_that_does_not_fit_the_recipe_is_refused_by_key(tiny_recipe, unbroken, tmp_path):
    init = str(train_folder(unbroken) / "students" / "ema")
    with pytest.raises(UserError, match=r"student\.init: .* has layers 1, the recipe has 2"):
        train(tiny_recipe(tmp_path, student={"init": init, "layers": 2}, train=AFD))


def test_without_held_out_prompts_training_goes_on_without_their_metrics(tiny_recipe, tmp_path):
    prompts = PromptsConfig(source="unused.txt")
    folder = train(tiny_recipe(tmp_path, prompts=prompts, train=changed(AFD, steps=1)))
    assert not any("held_out" in key for row in read_metrics(folder / "metrics.jsonl") for key in row)
