"""The memory estimate of the objectives beside AFD, at the released 1.3B student's size: 2.64 GiB in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

from afd_data.config import FolderConfig, PromptsConfig, VideoConfig
from afd_train.config import Recipe, SpaceTimeConfig, StudentConfig, TrainConfig
from afd_train.dry_run import _run_text
from afd_train.memory import GIB, advice, estimate, total
from afd_train.memory_parts import Load, Part, copies
from afd_train.memory_phases import phases, update

COUNT = 1_418_996_800  # parameters


def recipe_of(objective: dict[str, Any], **train: Any) -> Recipe:
    """The released student at its own size, one clip of each of 8 prompts in a pass."""
    return Recipe(
        out="runs/x",
        video=VideoConfig(width=832, height=480, frames=81, fps=16.0),
        prompts=PromptsConfig(source="teacher"),
        teacher=FolderConfig(path="clips"),
        student=StudentConfig.model_validate({"preset": "self-forcing"}),
        discriminator=SpaceTimeConfig(patch=4, tubelet_frames=3, chunk_causal=True),
        train=TrainConfig.model_validate({"objective": objective} | train),
    )


def kept(recipe: Recipe) -> dict[str, float]:
    """Copies beside the student, in GiB."""
    parts = copies(recipe.student, recipe.train, Load.of(recipe, recipe.train, processes=1))
    return {part.name: part.bytes / GIB for part in parts}


def phases_of(recipe: Recipe) -> dict[str, list[Part]]:
    return phases(recipe, recipe.train, Load.of(recipe, recipe.train, processes=1))


def part(parts: list[Part], name: str) -> int:
    (found,) = (part for part in parts if part.name == name)
    return found.bytes


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "flow-matching"}, set()),
        ({"name": "sft"}, set()),
        ({"name": "sft", "prior_weight": 0.1}, {"reference"}),
        ({"name": "gan"}, {"reference"}),
        ({"name": "gan", "prior_weight": 0.0}, set()),
        ({"name": "afd"}, {"old policy", "reference"}),
        ({"name": "afd-branch"}, {"old policy", "reference"}),
        ({"name": "distil"}, {"scores"}),
        ({"name": "dmd"}, {"scores"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_every_objective_keeps_its_own_policies_and_scores(objective, expected):
    assert kept(recipe_of(objective)).keys() == expected | {"evaluation average"}


def test_two_scores_are_two_networks_and_one_float32_optimiser():
    # 2 x 2.64 GiB, and masters, gradients and two moments of 5.29 GiB each
    assert kept(recipe_of({"name": "dmd"}))["scores"] == pytest.approx(2 * 2.64 + 4 * 5.29, rel=0.01)


@pytest.mark.parametrize(("name", "clips"), [("afd", 24), ("afd-branch", 4), ("gan", 24)])
def test_rollouts_of_adversarial_objectives_are_counted(name, clips):
    recipe = recipe_of({"name": name}, prompts_per_step=4, rollouts_per_prompt=6)
    load = Load.of(recipe, recipe.train, processes=1)
    assert (load.step_clips, load.clips, load.prompts) == (24, clips, 4)


@pytest.mark.parametrize("name", ["sft", "flow-matching", "dmd", "distil"])
def test_the_others_have_one_clip_of_a_prompt(name):
    recipe = recipe_of({"name": name}, prompts_per_step=4, rollouts_per_prompt=6)
    assert Load.of(recipe, recipe.train, processes=1).step_clips == 4


def test_distribution_matching_draws_all_clips_at_once():
    recipe = recipe_of({"name": "dmd"}, clips_per_pass=1)
    assert Load.of(recipe, recipe.train, processes=1).clips == 8


def activations(objective: dict[str, Any], **train: Any) -> int:
    recipe = recipe_of(objective, **({"clips_per_pass": 1} | train))
    load = Load.of(recipe, recipe.train, processes=1)
    return part(update(recipe.student, recipe.train, load), "activations")


def test_teacher_forcing_doubles_the_tokens_of_an_update_and_a_chunk_has_a_seventh():
    whole = activations({"name": "gan"})
    assert activations({"name": "sft"}) == activations({"name": "flow-matching"}) == 2 * whole
    assert activations({"name": "gan"}, chunk_by_chunk=True) == whole // 7  # 3 of 21 latent frames


def test_a_pass_of_branching_holds_prompts_whose_candidates_share_a_context():
    of_a_clip = activations({"name": "afd"}, clips_per_pass=1)
    settings: dict[str, Any] = {"prompts_per_step": 6, "rollouts_per_prompt": 8}
    assert activations({"name": "afd"}, **settings, clips_per_pass=None) == 48 * of_a_clip
    assert activations({"name": "afd-branch"}, **settings, clips_per_pass=None) == 6 * of_a_clip
    assert activations({"name": "afd-branch"}, **settings, clips_per_pass=2) == 2 * of_a_clip
    assert activations({"name": "afd-branch"}, **settings, chunk_by_chunk=True) == of_a_clip // 7


def test_the_real_score_is_fine_tuned_before_the_student_moves_with_an_optimiser_of_its_own():
    recipe = recipe_of({"name": "dmd", "real_prompts": 4}, clips_per_pass=2)
    found = phases_of(recipe)
    assert found.keys() == {"drawing", "fake score", "real score", "update"}
    assert part(found["real score"], "real score's optimiser") == 4 * 4 * COUNT
    one = activations({"name": "flow-matching"})
    assert part(found["real score"], "activations") == 2 * one
    assert part(found["fake score"], "activations") == 8 * one  # all clips of the step
    assert phases_of(recipe_of({"name": "dmd", "real_steps": 0})).keys() == {"drawing", "fake score", "update"}


def test_adapters_do_not_make_a_score_smaller():
    recipe = recipe_of({"name": "dmd"}, policy={"name": "lora"})
    whole = phases_of(recipe_of({"name": "dmd"}))["fake score"]
    assert part(phases_of(recipe)["fake score"], "gradients of a pass") == part(whole, "gradients of a pass")


def test_a_gan_scores_draws_asks_its_reference_and_updates():
    objective: dict[str, Any] = {"name": "gan"}
    assert phases_of(recipe_of(objective)).keys() == {"drawing", "discriminator", "other policies", "update"}
    assert phases_of(recipe_of(objective | {"prior_weight": 0.0})).keys() == {"drawing", "discriminator", "update"}


@pytest.mark.parametrize("settings", [{"sft_steps": 5}, {"sft_weight": 0.1}])
def test_a_warm_start_or_an_anchor_passes_the_teachers_clips_through_the_student(settings):
    recipe = recipe_of({"name": "afd"} | settings, prompts_per_step=4, clips_per_pass=3)
    assert part(phases_of(recipe)["supervised"], "activations") == 3 * activations({"name": "flow-matching"})
    assert "supervised" not in phases_of(recipe_of({"name": "afd"}))


def test_a_gan_is_advised_to_go_chunk_by_chunk():
    recipe = recipe_of({"name": "gan"}, gpu_memory_gb=24.0)
    parts = estimate(recipe, recipe.train)
    lines = advice(parts, recipe, recipe.train)
    assert any("train.chunk_by_chunk=true" in line for line in lines)
    chunked = recipe.train.model_copy(update={"chunk_by_chunk": True, "clips_per_pass": 1})
    assert total(estimate(recipe, chunked)) < total(parts)


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ({"name": "sft"}, "sft, 10 steps x 4 prompts = 40 clips"),
        ({"name": "gan"}, "gan, 10 steps x 4 prompts x 6 rollouts = 240 clips"),
        ({"name": "afd-branch"}, "afd-branch, 10 steps x 4 prompts x 6 rollouts = 240 clips"),
        (
            {"name": "dmd", "real_steps": 7, "real_prompts": 3},
            "dmd, 10 steps x 4 prompts = 40 clips, after 7 steps x 3 prompts for the real score",
        ),
        (
            {"name": "afd", "sft_steps": 9},
            "afd, 10 steps x 4 prompts x 6 rollouts = 240 clips, after 9 supervised steps x 4 prompts",
        ),
    ],
    ids=str,
)
def test_a_dry_run_tells_what_is_drawn_and_what_is_learnt_before(objective, text):
    run = recipe_of(objective, steps=10, prompts_per_step=4, rollouts_per_prompt=6).train
    assert _run_text(run) == text
