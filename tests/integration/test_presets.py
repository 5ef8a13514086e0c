"""Every released student's preset at a small size, from a checkpoint in its own layout to an exported student."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from afd_train.config import Recipe
from afd_train.presets import PRESETS, Preset
from afd_train.recipe import load_recipe
from afd_train.runlog import read_metrics
from afd_train.students import new_transformer
from afd_train.students.folder import save_student, starting_student
from afd_train.students.keys import to_original
from tests.tiny_wan import TEXT_DIM, save_text_encoder, save_vae

SIZE: dict[str, Any] = {"dim": 24, "heads": 2, "layers": 2, "ffn_dim": 32, "frequency_dim": 16, "text_dim": TEXT_DIM}
PROMPTS = [f"A {colour} ball is {verb}." for colour in ("red", "green", "blue") for verb in ("dropped", "thrown up")]
LORA = {"name": "lora", "rank": 4, "alpha": 4}
# 21 pixel frames of 32 x 32 are 6 latent frames of 4 x 4: two chunks of 3, or six of 1.
RECIPE: dict[str, Any] = {
    "video": {"width": 32, "height": 32, "frames": 21, "fps": 8},
    "prompts": {"source": "prompts.txt", "validation": 1, "test": 2, "near_duplicate": 1.0},
    "teacher": {"name": "playground"},
    "cache": {"frozen": 0, "near_duplicate": -1},
    "discriminator": {"dim": 16, "heads": 2, "layers": 1, "warmup_steps": 1, "warmup_prompts": 2},
    "train": {"steps": 2, "prompts_per_step": 2, "rollouts_per_prompt": 2, "learning_rate": 1e-3, "warmup_steps": 0,
              "save_every_steps": 1, "validate_every_steps": 2, "validation_prompts": 1, "held_out_per_step": 1},
    "eval": {"clips_per_prompt": 1, "policies": ["base", "ema"], "resamples": 100, "gallery_rows": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random text encoder, tokenizer and autoencoder, and prompts."""
    folder = save_text_encoder(tmp_path_factory.mktemp("wan"))
    save_vae(folder / "vae")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def released(recipe: Recipe, path: Path) -> None:
    """Random weights in the layout of the preset's file: original names, in the wrappers they were saved with."""
    torch.manual_seed(1)
    state = to_original(new_transformer(recipe.student).state_dict())
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in state.items()}
    other = {f"model.{name}": torch.zeros_like(value) for name, value in state.items()}
    wanted = recipe.student.init_key
    torch.save({"generator": other, "critic": {}, "generator_ema": other} | {str(wanted): wrapped}, path)


def written(folder: Path, wan: Path, preset: Preset) -> Path:
    student = {
        "preset": preset,
        "init": str(folder / "released.pt"),
        "text_encoder_path": str(wan),
        "autoencoder_path": str(wan / "vae"),
        **SIZE,
    }
    lora = preset in ("self-forcing", "causal-forcing-2step")
    policy = {"policy": LORA} if lora else {}
    formats = ["diffusers", "original", "merged", *(["lora"] if lora else [])]
    recipe = RECIPE | {
        "out": str(folder / "run"),
        "prompts": RECIPE["prompts"] | {"source": str(wan / "prompts.txt")},
        "student": student,
        "train": RECIPE["train"] | policy,
        "export": {"formats": formats},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    released(load_recipe(path), folder / "released.pt")
    return path


@pytest.mark.slow  # five whole runs: cache, training, evaluation and export, then evaluations of what was exported
@pytest.mark.parametrize("preset", get_args(Preset))
def test_a_preset_goes_the_whole_road_and_its_exports_draw_the_same_videos(afd, wan, tmp_path, preset):
    path = written(tmp_path, wan, preset)
    result = afd("run", path)
    assert result.exit_code == 0, result.stderr
    run = tmp_path / "run"
    rows = read_metrics(run / "train" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [-1, 0, 1]
    recipe = load_recipe(path)
    expected = {file.name: file.read_bytes() for file in (run / "eval" / "videos" / "ema").glob("*.mp4")}
    assert len(expected) == 2
    assert expected != {file.name: file.read_bytes() for file in (run / "eval" / "videos" / "base").glob("*.mp4")}
    for name in ("diffusers", "original.pt", "merged"):
        again = tmp_path / name
        student = starting_student(recipe.student, recipe.video, 0, str(run / "export" / name))
        save_student(student, again / "train" / "students" / "ema")
        sets = (f"out={again}", f"stream.folder={run / 'cache'}", "eval.policies=[ema]")
        result = afd("eval", path, *(word for text in sets for word in ("--set", text)))
        assert result.exit_code == 0, result.stderr
        assert {file.name: file.read_bytes() for file in (again / "eval" / "videos" / "ema").glob("*.mp4")} == expected


def test_every_preset_names_its_file_on_the_hub():
    for preset in PRESETS.values():
        assert preset["init"].startswith("hf://")
        assert preset["init"].endswith(".pt")
