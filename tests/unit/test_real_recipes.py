"""The recipes of the released students: they load, say what they would do, and fit the GPUs that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from afd_train.config import Recipe
from afd_train.memory import GIB, estimate, missing, total
from afd_train.recipe import load_recipe, read_recipe
from afd_train.shipped import shipped_recipes

RELEASED = ("self-forcing", "causal-forcing", "self-forcing-24gb")
CAPTIONS = ("a red ball falls", "a dog runs over a lawn", "waves break on a beach", "two people dance in a street")


def sets_for(name: str, clips: Path) -> list[str]:
    """What a recipe cannot know."""
    return [] if name == "seedance" or name.startswith(("quickstart", "miniature/")) else [f"teacher.path={clips}"]


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with captions of 40 videos, and a key; a dry run reads no video and asks nobody."""
    monkeypatch.setenv("ARK_API_KEY", "a-key-that-is-never-sent")
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.mp4").write_bytes(b"")
        (folder / f"{index}.txt").write_text(f"{CAPTIONS[index % 4]}, take {index} on day {index // 4}")
    return folder


def released(name: str) -> Recipe:
    return load_recipe(name, ["teacher.path=clips"])


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_dry_runs(afd: Callable[..., Result], clips, name):
    sets = [argument for text in sets_for(name, clips) for argument in ("--set", text)]
    result = afd("run", name, "--dry-run", *sets)
    assert result.exit_code == 0, result.stderr
    assert "# Plan" in result.stdout


def test_the_output_of_a_dry_run_with_a_memory_table_is_a_recipe(afd: Callable[..., Result], clips, tmp_path):
    text = afd("train", "self-forcing-24gb", "--dry-run", "--set", f"teacher.path={clips}").stdout
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe("self-forcing-24gb", [f"teacher.path={clips}"])


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_released_student_fits_the_gpu_that_its_recipe_names(name, processes):
    recipe = released(name)
    assert missing(estimate(recipe, recipe.train, processes), recipe.train) <= 0


@pytest.mark.parametrize("name", RELEASED)
def test_settings_are_the_papers(name):
    recipe = released(name)
    train, shape = recipe.train, recipe.student.latent_shape(recipe.video)
    assert shape == (21, 16, 60, 104)
    assert train.prompts_per_step * train.rollouts_per_prompt == 32
    assert train.policy.name == "lora"
    assert (train.policy.rank, train.policy.alpha) == (256, 256.0)
    assert train.objective.name == "afd"
    assert (train.learning_rate, train.weight_decay, train.max_grad_norm) == (1e-5, 1e-4, 1.0)
    afd = train.objective
    assert (afd.policy_mix, afd.old_policy_decay, afd.prior_weight, afd.advantage_clip) == (0.1, 0.99, 1e-4, 5.0)


def test_the_24_gb_recipe_says_its_sum():
    loaded = read_recipe("self-forcing-24gb", ["teacher.path=clips"])
    parts = estimate(loaded.recipe, loaded.recipe.train)
    assert f"{total(parts) / GIB:.1f} GiB" in loaded.file.read_text()


def test_the_80_gb_recipe_on_24_gb_is_told_to_draw_fewer_clips(afd: Callable[..., Result], clips):
    sets = ["--set", f"teacher.path={clips}", "--set", "train.gpu_memory_gb=24"]
    text = afd("train", "self-forcing", "--dry-run", *sets).stdout
    assert "of 24 GB: does not fit" in text
    assert "--set train.clips_per_pass=1 saves" in text


def test_a_dry_run_counts_the_processes_of_accelerate_launch(
    afd: Callable[..., Result], clips, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    text = afd("train", "self-forcing", "--dry-run", "--set", f"teacher.path={clips}").stdout
    assert "memory of each of 4 GPUs" in text
    assert "M parameters, bfloat16, over 4 GPUs" in text
