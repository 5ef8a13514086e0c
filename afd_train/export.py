"""A student folder -> what other programs open: stock diffusers, Self-Forcing's inference, PEFT, or afd elsewhere.

Weights are written bit for bit as the student has them; of a LoRA student they are the merged ones.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Literal

import torch

from afd_data.errors import UserError
from afd_data.files import atomic_folder, atomic_write
from afd_train import runs
from afd_train.config import Recipe, StudentConfig
from afd_train.students.adapters import ADAPTER_FILES, read_adapter
from afd_train.students.folder import ADAPTER, open_student, read_about, save_student, write_transformer
from afd_train.students.keys import to_original

log = logging.getLogger(__name__)

Format = Literal["diffusers", "original", "lora", "merged"]


def export_student(source: Path, target: Path, format: Format) -> Path:
    """Write the student in folder `source` to `target`, complete or not at all, and return `target`.

    diffusers: a folder for `WanTransformer3DModel.from_pretrained`; original: a .pt file for Self-Forcing's inference;
    lora: a PEFT folder; merged: a student folder that needs no base.  Raises UserError: no student there, a format that
    it cannot have, or something at `target` that is not to be lost.
    """
    if target.exists():
        raise UserError(f"{target}: there already; name another place, or remove it")
    _write(source, target, format)
    return target


def export_all(recipe: Recipe) -> list[Path]:
    """Write a trained recipe's student in the formats of `recipe.export` below OUT/export, in place of earlier ones."""
    source = runs.student_folder(recipe, recipe.export.policy)
    targets = []
    for format in recipe.export.formats:
        name = "original.pt" if format == "original" else format
        targets.append(runs.export_folder(recipe) / name)
        _write(source, targets[-1], format)
    return targets


def _write(source: Path, target: Path, format: Format) -> None:
    match format:
        case "diffusers":
            student = open_student(source)
            if odd := _unlike_wan(student.config):
                log.warning(f"{target}: stock pipelines cannot sample this student, it has {odd}")
            with atomic_folder(target) as part:
                write_transformer(student, part)
        case "original":
            _write_original(source, target)
        case "lora":
            _write_adapter(source, target)
        case "merged":
            save_student(open_student(source), target)


def _write_original(source: Path, target: Path) -> None:
    if target.suffix != ".pt":
        raise UserError(f"{target}: the name of this format must end in .pt")
    config = read_about(source).student
    if odd := _unlike_wan(config):
        raise UserError(f"{source}: not a Wan, so Self-Forcing's inference cannot sample it: it has {odd}")
    state = to_original(open_student(source).net.transformer.state_dict())
    weights = {f"model.{name}": value for name, value in state.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        # Whether its inference is told to use the average or not, it finds this student.
        torch.save({"generator": weights, "generator_ema": weights}, file)


def _write_adapter(source: Path, target: Path) -> None:
    if read_about(source).base is None:
        raise UserError(f"{source}: all weights of this student were trained, so it has no adapter to export")
    read_adapter(source / ADAPTER)
    with atomic_folder(target) as part:
        for name in ADAPTER_FILES:
            shutil.copyfile(source / ADAPTER / name, part / name)


def _unlike_wan(config: StudentConfig) -> str | None:
    """What a program made for Wan does not know about."""
    odd = {
        "student.prediction clean": config.prediction != "velocity",
        "student.coordinates": config.coordinates,
    }
    return " and ".join(key for key, is_so in odd.items() if is_so) or None
