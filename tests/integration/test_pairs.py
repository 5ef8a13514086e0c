"""Every objective with every discriminator: it runs, resumes bit for bit, or is refused with the reason.

A new class of either union must be given small settings here, and then takes part in all of it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from afd_data.errors import UserError
from afd_train.config import Recipe, TrainConfig
from afd_train.discriminator_config import DiscriminatorConfig
from afd_train.discriminators import open_discriminator
from afd_train.objective_config import ADVERSARIAL, DistilConfig, DmdConfig, ObjectiveConfig
from afd_train.runlog import read_metrics
from afd_train.students import new_student
from afd_train.students.folder import save_student
from afd_train.trainer import train
from tests.tiny_trunks import save_qwen2_vl, save_vjepa2

# name -> small settings
OBJECTIVES: dict[str, dict[str, Any]] = {
    "afd": {"noisings_per_clip": 2},
    "afd-branch": {},
    "sft": {"prior_weight": 0.1},
    "gan": {},
    "dmd": {"real_steps": 2, "real_prompts": 3},
    "distil": {},
    "flow-matching": {},
}
DISCRIMINATORS = ("spacetime", "features", "vjepa2", "vlm")
SHARED: dict[str, Any] = {"warmup_steps": 2, "warmup_prompts": 4}
TRUNK: dict[str, Any] = {"frames": 2, "rank": 2, "alpha": 2.0}
BOOKS: dict[str, Any] = {
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "validate_every_steps": 1,
    "validation_prompts": 2,
    "held_out_per_step": 2,
    "trackers": (),
}
CHUNKS_WANTED = (
    "discriminator.name: this objective weighs chunks one by one and needs a discriminator that scores them: "
    "spacetime with chunk_causal=true"
)
LATENTS_WANTED = (
    "discriminator.name: gan takes the discriminator's gradient with respect to latents, and {} looks at pixels, "
    "through whose decoder no gradient is computed; use spacetime or features, or train.objective.name afd"
)
NO_CHUNKS = ("features", "vjepa2", "vlm")
NO_LATENTS = ("vjepa2", "vlm")


def discriminator_settings(name: str, tmp_path: Path) -> dict[str, Any]:
    """A small one of each kind; pre-trained networks are made with random weights in `tmp_path`."""
    match name:
        case "spacetime":
            return SHARED | {"dim": 16, "heads": 2, "layers": 1, "chunk_causal": True}
        case "features":
            return SHARED | {"dim": 8}
        case "vjepa2":
            return SHARED | TRUNK | {"path": str(save_vjepa2(tmp_path / "vjepa2")), "dim": 8}
        case "vlm":
            return SHARED | TRUNK | {"path": str(save_qwen2_vl(tmp_path / "vlm")), "frame_pixels": 3136}
    raise ValueError(name)


def names_of(union: Any) -> set[str]:
    return {section.model_fields["name"].default for section in get_args(get_args(union)[0])}


def refusal(objective: str, discriminator: str) -> str | None:
    """Why the two do not go together, in the recipe's words."""
    if objective == "gan" and discriminator in NO_LATENTS:
        return LATENTS_WANTED.format(discriminator)
    if objective == "afd-branch" and discriminator in NO_CHUNKS:
        return CHUNKS_WANTED
    return None


def pairs() -> Iterator[tuple[str, str]]:
    """Objectives that have no discriminator run once."""
    for objective in OBJECTIVES:
        yield from ((objective, name) for name in (DISCRIMINATORS if objective in ADVERSARIAL else ["spacetime"]))


RUNNING = [pair for pair in pairs() if refusal(*pair) is None]
REFUSED = [pair for pair in pairs() if refusal(*pair) is not None]


@pytest.fixture
def recipe_of(tiny_recipe, tmp_path) -> Callable[..., Recipe]:
    """`recipe_of("gan", {"name": "spacetime", ...}, "folder", steps=3)` -> a recipe of both."""

    def make(objective: dict[str, Any], discriminator: dict[str, Any], out: str = "run", steps: int = 3) -> Recipe:
        of_objective = TypeAdapter(ObjectiveConfig).validate_python(objective)
        of_discriminator = TypeAdapter(DiscriminatorConfig).validate_python(discriminator)
        run = TrainConfig(objective=of_objective, steps=steps, **BOOKS)
        plain = tiny_recipe(tmp_path / out, student={"steps": (1000, 500)})
        return Recipe(**(dict(plain) | {"discriminator": of_discriminator, "train": run}))

    return make


def test_every_objective_and_discriminator_takes_part():
    assert OBJECTIVES.keys() == names_of(ObjectiveConfig)
    assert set(DISCRIMINATORS) == names_of(DiscriminatorConfig)


def test_the_lists_of_what_does_not_fit_are_what_the_discriminators_say():
    sections = {section.model_fields["name"].default: section for section in get_args(get_args(DiscriminatorConfig)[0])}
    assert [name for name, section in sections.items() if section().space == "pixels"] == list(NO_LATENTS)
    assert [name for name in sections if name != "spacetime" and not sections[name]().per_chunk] == list(NO_CHUNKS)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_network_looks_at_what_its_section_says(recipe_of, tmp_path, name):
    recipe = recipe_of({"name": "afd"}, {"name": name, **discriminator_settings(name, tmp_path)})
    net = open_discriminator(recipe.discriminator, new_student(recipe.student, recipe.video, 0), 0)
    assert net.space == recipe.discriminator.space


def left_by(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors, the students and the log."""
    found = [*(folder / "checkpoints/step-000003").glob("*.safetensors"), *(folder / "students").rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*found, folder / "metrics.jsonl"]}


@pytest.mark.parametrize(("objective", "discriminator"), RUNNING)
def test_a_pair_runs_and_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    recipe_of, tmp_path, objective, discriminator
):
    sections = (
        {"name": objective, **OBJECTIVES[objective]},
        {"name": discriminator, **discriminator_settings(discriminator, tmp_path)},
    )
    whole = train(recipe_of(*sections, "whole"))
    train(recipe_of(*sections, "broken", steps=2))
    broken = train(recipe_of(*sections, "broken"))
    expected = left_by(whole)
    assert {"metrics.jsonl", "checkpoints/step-000003/student.safetensors"} < expected.keys()
    assert ("checkpoints/step-000003/discriminator.safetensors" in expected) == (objective in ADVERSARIAL)
    assert left_by(broken) == expected
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["step"] >= 0]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["student/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(("objective", "discriminator"), REFUSED)
def test_a_pair_that_makes_no_sense_is_refused_with_the_reason(recipe_of, objective, discriminator):
    with pytest.raises(ValidationError) as caught:
        recipe_of({"name": objective, **OBJECTIVES[objective]}, {"name": discriminator, **SHARED})
    (error,) = caught.value.errors()
    assert error["msg"] == f"Value error, {refusal(objective, discriminator)}"


def test_credit_by_chunk_wants_a_discriminator_that_scores_chunks(recipe_of):
    with pytest.raises(ValidationError, match=r"needs a discriminator that scores them: spacetime with chunk_causal"):
        recipe_of({"name": "afd", "credit": "chunk"}, {"name": "spacetime", "dim": 16, "heads": 2})


@pytest.mark.parametrize("objective", [DmdConfig(real_steps=2, real_prompts=3), DistilConfig()], ids=lambda o: o.name)
def test_a_run_with_a_real_score_from_a_folder_goes_on_with_the_same_weights_only(recipe_of, tmp_path, objective):
    settings = objective.model_dump() | {"real": str(tmp_path / "real")}
    judge = {"name": "spacetime", **discriminator_settings("spacetime", tmp_path)}
    first = recipe_of(settings, judge, steps=1)
    save_student(new_student(first.student, first.video, seed=1), tmp_path / "real")
    train(first)
    assert [row["step"] for row in read_metrics(train(recipe_of(settings, judge, steps=2)) / "metrics.jsonl")][-1] == 1
    save_student(new_student(first.student, first.video, seed=2), tmp_path / "real")
    with pytest.raises(UserError, match=r"holds a run of another recipe \(real weights differ\)"):
        train(recipe_of(settings, judge, steps=3))
