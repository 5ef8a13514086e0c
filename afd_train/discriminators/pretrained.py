"""Networks that others trained, as frozen or adapted trunks over frames; from a folder that holds all of their tensors.

transformers fills what a file lacks with random numbers and prints a table.  A discriminator on such a network still
learns a little, and nobody would notice: here it is an error that names what is missing.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from afd_data.errors import UserError
from afd_train.discriminator_config import Adapted
from afd_train.hub import local_path
from afd_train.students import DTYPES
from afd_train.students.keys import listed

KEY = "discriminator.path"


def model_folder(path: str, kind: str) -> Path:
    """The folder that `path` means, of a model of this `kind` as its config.json says.  Raises UserError."""
    folder = local_path(path, KEY)
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError:
        raise UserError(f"{KEY}: {folder} holds no config.json. Name the folder of a {kind} model.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{KEY}: {file} is not a configuration of transformers ({error!r})") from None
    if found != kind:
        raise UserError(f"{KEY}: {folder} holds a {found}, not a {kind}. Name the folder of a {kind} model.")
    return folder


def open_model(network: type[PreTrainedModel], folder: Path, config: Adapted, unused: Sequence[str] = ()) -> Any:
    """The network with the weights in `folder`, frozen, on the CPU, without dropout.

    unused: beginnings of tensors' names that may be missing.  Raises UserError where any other is, or does not fit.
    """
    try:
        loaded: Any = network.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            dtype=DTYPES[config.dtype],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise UserError(f"{KEY}: {folder} cannot be loaded ({error}). Copy or download it again.") from None
    model, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(tuple(unused)))
    if missing:
        raise UserError(
            f"{KEY}: {folder} lacks {len(missing)} tensors of a {model.config.model_type}: {listed(missing)}. "
            "They would be random numbers; copy or download it again."
        )
    if config.gradient_checkpointing and config.train == "lora":  # a frozen one keeps nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of another name that older versions do not know
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).eval()


def adapt(trunk: nn.Module, config: Adapted, layers: str) -> None:
    """Add low-rank adapters that change nothing yet, in the type of the weights, where the recipe asks for them.

    layers: a regular expression for whole names of linear layers.
    """
    if config.train == "lora":
        import peft

        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=layers)  # pyright: ignore[reportArgumentType]
        peft.inject_adapter_in_model(settings, trunk)
    for module in trunk.modules():
        # A layer keeps only its input while it is in training mode itself; what is inside stays without dropout.
        module.training = getattr(module, "gradient_checkpointing", False)


def resized(clips: Tensor, height: int, width: int, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """[B, F, 3, H, W] in [-1, 1] -> [B, F, 3, height, width], normalised; mean, deviation: of pixels in [0, 1]."""
    frames = F.interpolate(clips.flatten(0, 1), (height, width), mode="bicubic", antialias=True)
    centre, scale = (torch.tensor(values, device=clips.device)[:, None, None] for values in (mean, deviation))
    return (((frames + 1) / 2 - centre) / scale).unflatten(0, clips.shape[:2])


def check_frames(frames: int, together: int) -> None:
    """Raises UserError where the network cannot take so many frames, `together` of which make a token."""
    if frames % together:
        raise UserError(
            f"discriminator.frames: {frames} is not divisible by {together}, the frames that make a token. "
            f"Set {frames + together - frames % together}."
        )
