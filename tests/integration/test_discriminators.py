"""`afd train` with discriminators on other networks: a run that is resumed equals an unbroken one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from afd_train.config import LoraConfig, Recipe, TrainConfig
from afd_train.discriminator_config import DiscriminatorConfig, FeaturesConfig, VJepa2Config, VlmConfig
from afd_train.objective_config import AfdConfig
from afd_train.runs import train_folder
from afd_train.trainer import train
from tests.tiny_trunks import save_qwen2_vl, save_vjepa2

STEPS = 2
WARMUP: dict[str, Any] = {"warmup_steps": 1, "warmup_prompts": 2}
SMALL: dict[str, Any] = {"rank": 2, "frames": 2, **WARMUP}
TRAIN: dict[str, Any] = {
    "objective": AfdConfig(), "steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 0, "prompts_per_step": 2,
    "rollouts_per_prompt": 2, "save_every_steps": 1, "keep_checkpoints": 9, "validation_prompts": 2,
    "held_out_per_step": 2,
}  # fmt: skip


def discriminator(kind: str, folder: Path) -> DiscriminatorConfig:
    match kind:
        case "features":
            return FeaturesConfig(dim=16, **WARMUP)
        case "vjepa2":
            return VJepa2Config(path=str(save_vjepa2(folder / kind)), dim=16, **SMALL)
        case _:
            return VlmConfig(path=str(save_qwen2_vl(folder / kind)), gradient_checkpointing=True, **SMALL)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("features", {}), ("features", {"policy": LoraConfig(rank=4)}), ("vjepa2", {}), ("vlm", {})],
    ids=["features", "features-of-an-adapted-student", "vjepa2", "vlm"],
)
def test_a_resumed_run_equals_an_unbroken_one_and_keeps_no_frozen_weights(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, kind: str, settings: dict[str, Any]
):
    tiny = tiny_recipe(tmp_path / "run", train=TrainConfig(**(TRAIN | settings)))
    recipe = Recipe.model_validate(dict(tiny) | {"discriminator": discriminator(kind, tmp_path)})
    train(recipe)
    checkpoints = train_folder(recipe) / "checkpoints"
    last = checkpoints / f"step-{STEPS:06d}"
    expected = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    assert {"discriminator.safetensors", "discriminator.optimizer.safetensors"} <= expected.keys()
    kept = load_file(last / "discriminator.safetensors")
    assert all(name.startswith("head.") or "lora" in name or name == "reward" for name in kept)
    for path in checkpoints.iterdir():
        if path.name > "step-000001":
            shutil.rmtree(path)
    train(recipe)
    assert {path.name: path.read_bytes() for path in last.glob("*.safetensors")} == expected
