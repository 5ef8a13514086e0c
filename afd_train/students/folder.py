"""The folder a student is kept in: `student.json` and `transformer/`, which stock diffusers opens by itself."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from afd_data.config import Config, VideoConfig
from afd_data.errors import UserError
from afd_data.files import atomic_folder
from afd_train.config import StudentConfig
from afd_train.students import Student, new_student

log = logging.getLogger(__name__)

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What a student's weights depend on.
NETWORK = ("dim", "heads", "layers", "ffn_dim", "frequency_dim", "chunk_frames", "prediction", "coordinates", "autoencoder",
           "pixel_factor", "pixel_centre", "pixel_scale", "text_encoder", "text_tokens", "text_dim")  # fmt: skip


class StudentFile(Config):
    """`student.json`."""

    format: int = FORMAT
    student: StudentConfig
    video: VideoConfig


def save_student(student: Student, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a student folder; complete or not there at all.  `dtype` rounds the weights (bf16 halves the file)."""
    transformer = student.net.transformer
    state = {
        name: value.to("cpu", dtype or value.dtype).contiguous() for name, value in transformer.state_dict().items()
    }
    about = StudentFile(student=student.config, video=student.video)
    with atomic_folder(folder) as part:
        transformer.save_config(part / "transformer")
        (part / "transformer" / WEIGHTS).write_bytes(serialise(state, metadata={"format": "pt"}))
        (part / "student.json").write_text(about.model_dump_json(indent=1), encoding="utf-8")


def open_student(folder: Path | str) -> Student:
    """Read a student folder; `base` names the one that afd ships.  Float32 on the CPU, in evaluation mode.

    Raises UserError when the folder, its JSON or its weights are not a student's.
    """
    folder = shipped_base() if str(folder) == "base" else Path(folder)
    about = _read_about(folder)
    student = new_student(about.student, about.video, seed=0)
    state = _read_weights(folder / "transformer")
    wanted = student.net.transformer.state_dict()
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    odd = sorted(wanted.keys() ^ state.keys()) + wrong
    if odd:
        raise UserError(
            f"{folder}: the weights do not fit student.json ({len(odd)} tensors missing, unknown or of another shape, "
            f"for example {odd[0]}). Is transformer/ from another student?"
        )
    student.net.transformer.load_state_dict({name: value.float() for name, value in state.items()})
    student.net.eval()
    return student


def starting_student(config: StudentConfig, video: VideoConfig, seed: int, init: str | None) -> Student:
    """The student a training starts from: random weights of `seed`, or those of `init`; sampled as `config` says."""
    if init is None:
        return new_student(config, video, seed)
    opened = open_student(init)
    odd = [key for key in NETWORK if getattr(opened.config, key) != getattr(config, key)]
    if odd:
        key = odd[0]
        raise UserError(
            f"student.init: {init} has {key} {getattr(opened.config, key)}, the recipe has "
            f"{getattr(config, key)}. Set student.{key} as in {init}/student.json."
        )
    if (opened.video.width, opened.video.height, opened.video.frames) != (
        video.width,
        video.height,
        video.frames,
    ):
        log.warning(f"student.init: {init} was made for clips of another size")
    return Student(opened.net.train(), config, video)


def shipped_base() -> Path:
    """The base student of the quickstart."""
    return Path(str(resources.files("afd_recipes"))) / "base"


def _read_about(folder: Path) -> StudentFile:
    path = folder / "student.json"
    if not path.is_file():
        raise UserError(f"{folder}: no student here (student.json is missing). Name a folder that `afd train` wrote.")
    try:
        about = StudentFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a student's description: {error}") from None
    if about.format != FORMAT:
        raise UserError(f"{path}: format {about.format}, this afd reads {FORMAT}")
    return about


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the weights are missing") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy the student folder again") from None
