"""What a checkpoint must have been trained with to be gone on from, and what may change meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afd_data.errors import UserError
from afd_data.files import file_sha256
from afd_train.config import Recipe, TrainConfig
from afd_train.discriminator_config import Adapted
from afd_train.hub import local_path
from afd_train.objective_config import ADVERSARIAL, DistilConfig, DmdConfig
from afd_train.students.folder import open_student

# What may change between a run and its resumption without changing what was trained so far.
FREE_TO_CHANGE = {
    "steps",
    "seconds",
    "clock",
    "save_every_steps",
    "keep_checkpoints",
    "trackers",
    "stop_margin",
    "stop_reference_distance",
    "alarms",
    "on_alarm",
    "shard",  # whether it was sharded is kept instead
}


def identity_of(recipe: Recipe, config: TrainConfig, net: nn.Module, sharded: bool) -> dict[str, Any]:
    """JSON-able; `net` has the starting weights."""
    sections = {"student": recipe.student, "discriminator": recipe.discriminator, "video": recipe.video}
    identity: dict[str, Any] = {name: section.model_dump(mode="json") for name, section in sections.items()}
    settings = config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
    if isinstance(config.objective, DistilConfig | DmdConfig) and config.objective.real is not None:
        identity["real weights"] = _digest(open_student(config.objective.real).net)
    if isinstance(recipe.discriminator, Adapted) and config.objective.name in ADVERSARIAL:
        identity["discriminator weights"] = _files(local_path(recipe.discriminator.path, "discriminator.path"))
    return (
        identity
        | {f"train.{key}": value for key, value in settings.items()}
        | {"seed": recipe.seed, "held out": recipe.prompts.validation > 0}
        | {"starting weights": _digest(net), "train.shard": sharded}
    )


def check_identity(folder: Path, identity: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raises UserError where the run in `folder` was trained with something else."""
    if changed := [key for key in identity if identity[key] != recorded.get(key)]:
        raise UserError(
            f"{folder}: holds a run of another recipe ({', '.join(changed)} differ). "
            "Put the settings back, or choose another `--set out=FOLDER`."
        )


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file with weights, which checkpoints do not keep where they are frozen."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def _digest(net: nn.Module) -> str:
    """sha256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
