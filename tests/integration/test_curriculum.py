"""Adversarial training that watches itself, on a real small cache: its warm-up, its rate, and what alarms lead to."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from afd_data.config import PromptsConfig
from afd_data.errors import UserError
from afd_train.alarm_config import AlarmsConfig, Collapse, Drift, RewardHacking
from afd_train.config import Recipe, TrainConfig
from afd_train.discriminator_config import MarginBand
from afd_train.ending import read_ending, students_step
from afd_train.objective_config import AfdConfig, BranchConfig, FlowMatchingConfig
from afd_train.runlog import read_metrics
from afd_train.runs import train_folder
from afd_train.students.folder import open_student
from afd_train.trainer import train

BOOKS: dict[str, Any] = {
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "save_every_steps": 2,
    "keep_checkpoints": 99,
    "validate_every_steps": 2,
    "validation_prompts": 2,
    "held_out_per_step": 2,
    "warmup_steps": 0,
}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# Narrow enough that all of them act within a few steps.
EVERYTHING: dict[str, Any] = {
    "hardest": 0.5,
    "on_alarm": "warn",
    "stop_reference_distance": None,
    "alarms": AlarmsConfig(drift=Drift(motion=(0.999, 1.001))),
    "best_metric": "validation/ghost_mass",
}
BAND = MarginBand(low=-0.001, high=0.001, memory=0.5)


def run_of(**settings: Any) -> TrainConfig:
    return TrainConfig(**(BOOKS | settings))


def rows_of(recipe: Recipe) -> list[dict[str, float]]:
    return read_metrics(train_folder(recipe) / "metrics.jsonl")


def weights(recipe: Recipe, name: str) -> bytes:
    return (train_folder(recipe) / "students" / name / WEIGHTS).read_bytes()


def files(folder: Path) -> dict[str, bytes]:
    """All that must not depend on where a run was interrupted; clocks are taken out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name not in (".lock", "timings.jsonl") and "tensorboard" not in name:
            found[name] = re.sub(rb'"seconds": [0-9.e-]+', b"", path.read_bytes())
    return found


# Warm-up.


def test_a_warm_up_ends_when_the_held_out_loss_stays_and_training_goes_on(tiny_recipe, tmp_path, caplog):
    # At this rate it over-fits twelve prompts at once.
    discriminator = {"warmup_steps": 60, "warmup_learning_rate": 3e-2, "warmup_patience": 3}
    recipe = tiny_recipe(tmp_path, train=TrainConfig(steps=1, **BOOKS), discriminator=discriminator)
    with caplog.at_level(logging.INFO):
        train(recipe)
    rows = rows_of(recipe)
    warm = [row for row in rows if row["step"] < 0]
    means = [row["discriminator/held_out_loss_mean"] for row in warm]
    best = min(range(len(means)), key=means.__getitem__)
    assert best == len(means) - 1 - 3
    assert [row["step"] for row in rows] == [*range(-60, -60 + len(means)), 0]
    assert len(means) < 60
    assert f"has not improved on {means[best]:.3f}, of step {best - 60}, for 3 steps" in caplog.text
    assert means[1] == pytest.approx(0.9 * means[0] + 0.1 * warm[1]["discriminator/held_out_loss"])


@pytest.mark.parametrize("missing", ["prompts", "share"])
def test_a_warm_up_cannot_watch_prompts_that_are_not_held_out(tiny_recipe, tmp_path, missing):
    settings: dict[str, Any] = {"train": TrainConfig(**BOOKS)}
    if missing == "prompts":
        settings["prompts"] = PromptsConfig(source="unused.txt")
    else:
        settings["train"] = run_of(held_out_per_step=0)
    with pytest.raises(ValueError, match=r"discriminator\.warmup_patience: .*prompts\.validation"):
        tiny_recipe(tmp_path, discriminator={"warmup_patience": 3}, **settings)


def test_confidence_needs_a_prompts_rollouts_in_one_part(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"discriminator\.confidence: .*train\.rollouts_per_prompt"):
        confident(tiny_recipe, tmp_path, AfdConfig(), rollouts=4, per_pass=3)
    confident(tiny_recipe, tmp_path, AfdConfig(), rollouts=4, per_pass=4)
    confident(tiny_recipe, tmp_path, BranchConfig(), rollouts=4, per_pass=1)  # one of each prompt is followed


def confident(tiny_recipe, tmp_path, objective, rollouts: int, per_pass: int) -> Recipe:
    config = TrainConfig(
        **(BOOKS | {"objective": objective, "rollouts_per_prompt": rollouts, "clips_per_pass": per_pass})
    )
    return tiny_recipe(tmp_path, train=config, discriminator={"confidence": 1.0, "chunk_causal": True})


def test_hardest_prompts_need_margins():
    with pytest.raises(ValueError, match=r"hardest: flow-matching measures no margins"):
        TrainConfig(objective=FlowMatchingConfig(), hardest=0.5)


def test_more_prompts_a_step_than_the_cache_has_are_refused(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=run_of(prompts_per_step=13))
    with pytest.raises(UserError, match=r"prompts_per_step: 13 distinct .* has 12"):
        train(recipe)


# Everything at once, and interrupted.


@pytest.fixture(scope="module")
def watched(tiny_recipe, tmp_path_factory) -> Recipe:
    """A run with band, hardest prompts, best students and alarms that warn."""
    config = TrainConfig(steps=7, learning_rate=1e-3, **(BOOKS | EVERYTHING))
    discriminator = {"band": BAND, "warmup_patience": 2}
    recipe = tiny_recipe(tmp_path_factory.mktemp("watched"), train=config, discriminator=discriminator)
    train(recipe)
    return recipe


def test_the_rate_follows_the_margin(watched):
    rows = [row for row in rows_of(watched) if row["step"] >= 0]
    mean, factor = rows[0]["discriminator/clean_margin"], 1.0
    for row in rows:
        assert row["discriminator/learning_rate"] == pytest.approx(1e-4 * factor)
        mean = 0.5 * mean + 0.5 * row["discriminator/clean_margin"]
        factor *= 1.1 if mean < BAND.low else 1 / 1.1 if mean > BAND.high else 1.0
        factor = min(max(factor, 0.1), 4.0)
    assert rows[-1]["discriminator/learning_rate"] != 1e-4


def test_the_best_student_is_that_of_the_best_validation(watched):
    ghosts = {row["step"] + 1: row["validation/ghost_mass"] for row in rows_of(watched) if "validation/motion" in row}
    assert [*ghosts] == [2, 4, 6, 7]
    state = json.loads((train_folder(watched) / "checkpoints/step-000007/state.json").read_text())
    assert state["best"]["step"] == min(ghosts, key=lambda step: (ghosts[step], step))
    assert state["best"]["value"] == min(ghosts.values())
    open_student(train_folder(watched) / "students" / "best")


def test_validation_says_what_the_discriminators_scores_are_worth(watched):
    measured = [row for row in rows_of(watched) if "validation/motion" in row]
    assert all(row["discriminator/round_trip_accuracy"] == 0.5 for row in measured)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_resumed_run_equals_an_unbroken_one_with_all_that_watches_it(watched, tmp_path, step):
    shutil.copytree(watched.out, tmp_path / "run")
    recipe = watched.model_copy(update={"out": str(tmp_path / "run")})
    folder = train_folder(recipe)
    expected = files(folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "students" / "best")
    train(recipe)
    assert files(folder) == expected


def test_a_best_metric_that_is_not_measured_is_refused_by_name(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=TrainConfig(best_metric="validation/beauty", **BOOKS))
    with pytest.raises(UserError, match=r"best_metric: 'validation/beauty' .*validation/object_permanence"):
        train(recipe)


# A run that goes wrong: an old policy without a lag, and a learning rate far too high.


STEPS = 26


def wild(on_alarm: str, **settings: Any) -> TrainConfig:
    return run_of(
        objective=AfdConfig(old_policy_schedule="copy"),
        steps=STEPS,
        learning_rate=3e-2,
        on_alarm=on_alarm,
        alarms=AlarmsConfig(
            reward_hacking=RewardHacking(margin_fall=None), collapse=Collapse(spread=None), drift=Drift(motion=None)
        ),
        save_every_steps=10,
        **({"validate_every_steps": 10} | settings),
    )


@pytest.fixture(scope="module")
def ended(tiny_recipe, tmp_path_factory) -> Recipe:
    """Such a run with on_alarm=best; not to be written to."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("ended"), train=wild("best"))
    train(recipe)
    return recipe


def ending_of(recipe: Recipe) -> dict[str, Any]:
    return json.loads((train_folder(recipe) / "diagnosis.json").read_text())


def test_a_collapsing_run_stops_with_its_diagnosis(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=wild("stop"))
    with pytest.raises(UserError, match=r"step \d+: .*last checkpoint is intact") as caught:
        train(recipe)
    assert 20 <= int(re.findall(r"step (\d+)", str(caught.value))[0]) < STEPS - 1
    assert not (train_folder(recipe) / "diagnosis.json").exists()
    assert (train_folder(recipe) / "checkpoints" / "step-000020" / "state.json").is_file()


@pytest.mark.slow  # alarms wait for 20 steps, and this is a run of its own
def test_a_collapsing_run_goes_on_where_it_is_only_to_warn(tiny_recipe, tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, train=wild("warn"))
    train(recipe)
    assert rows_of(recipe)[-1]["step"] == STEPS - 1
    said = [record.getMessage() for record in caplog.records if "training goes on" in record.getMessage()]
    assert len(said) == len({text.partition(":")[0] for text in said}) >= 1


def test_a_collapsing_run_ends_well_with_its_best_students(ended):
    ending = ending_of(ended)
    rows = [row for row in rows_of(ended) if row["step"] >= 0]
    assert ending.keys() == {"name", "step", "message", "best_step"}
    assert ending["name"] in ("drift", "collapse")
    assert rows[-1]["step"] == ending["step"] < STEPS - 1
    measured = {r["step"] + 1: r["validation/object_permanence"] for r in rows if "validation/object_permanence" in r}
    assert ending["best_step"] == min(measured, key=lambda step: (-measured[step], step))
    assert weights(ended, "student") == weights(ended, "ema") == weights(ended, "best") != weights(ended, "base")


def test_the_same_command_again_says_that_it_has_ended_and_changes_nothing(ended, caplog):
    before = files(train_folder(ended))
    with caplog.at_level(logging.INFO):
        train(ended)
    assert files(train_folder(ended)) == before
    assert f"ended at step {ending_of(ended)['step']} by an alarm, {ending_of(ended)['name']}" in caplog.text


def test_an_evaluation_is_told_the_step_of_the_students_that_were_left(ended, watched):
    assert students_step(train_folder(ended)) == ending_of(ended)["best_step"]
    assert students_step(train_folder(watched)) == 7


def test_without_its_diagnosis_it_goes_on_from_the_last_checkpoint_to_the_same_end(ended, tmp_path):
    shutil.copytree(ended.out, tmp_path / "run")
    recipe = ended.model_copy(update={"out": str(tmp_path / "run")})
    before = files(train_folder(recipe))
    (train_folder(recipe) / "diagnosis.json").unlink()
    assert files(train(recipe)) == before


def test_a_run_that_starts_anew_forgets_how_another_ended(ended, tmp_path):
    shutil.copytree(ended.out, tmp_path / "run")
    settings = {"train": TrainConfig(steps=1, **BOOKS), "out": str(tmp_path / "run")}
    shutil.rmtree(tmp_path / "run" / "train" / "checkpoints")
    folder = train(ended.model_copy(update=settings))
    assert not (folder / "diagnosis.json").exists()


def test_a_damaged_diagnosis_is_named(tmp_path):
    for text in ("", "[]", '{"name": 1}'):
        (tmp_path / "diagnosis.json").write_text(text)
        with pytest.raises(UserError, match=r"diagnosis\.json: not what afd wrote .*Remove it"):
            read_ending(tmp_path)


@pytest.mark.slow  # alarms wait for 20 steps, and this is a run of its own
def test_where_nothing_was_validated_the_students_are_those_of_the_last_checkpoint(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, train=wild("best", best_metric=None))
    folder = train(recipe)
    assert ending_of(recipe)["best_step"] is None
    assert not (folder / "students" / "best").exists()
    assert weights(recipe, "student") != weights(recipe, "ema")
