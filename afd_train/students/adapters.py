"""A PEFT folder: low-rank adapters in `adapter_config.json` and `adapter_model.safetensors`, and merging them.

Written without PEFT, whose own `PeftModel.from_pretrained` opens it.  Only plain LoRA of linear layers: the adapted
weight is W + (alpha / rank) B A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_train.students.checkpoints import save_tensors
from afd_train.students.keys import listed

ADAPTER_FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's own holders of the network
_A, _B = ".lora_A.weight", ".lora_B.weight"


class AdapterFile(BaseModel):
    """What of `adapter_config.json` decides on the merged weights; everything but plain LoRA is refused."""

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    bias: Literal["none"] = "none"
    use_dora: Literal[False] = False
    use_rslora: Literal[False] = False
    fan_in_fan_out: Literal[False] = False
    lora_bias: Literal[False] = False
    rank_pattern: dict[str, Any] | None = Field(default=None, max_length=0)
    alpha_pattern: dict[str, Any] | None = Field(default=None, max_length=0)
    modules_to_save: list[str] | None = Field(default=None, max_length=0)


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], rank: int, alpha: float, targets: Sequence[str], base: str | None
) -> None:
    """Write a PEFT folder (`folder` is made).

    state: as `peft.get_peft_model_state_dict` names it; targets: ends of the adapted layers' names; base: where the
    weights below are to be had, for readers.
    """
    assert all(value.shape[0] == rank for name, value in state.items() if name.endswith(_A)), "another rank"
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_tensors({_PREFIX + name.removeprefix(_PREFIX): value for name, value in state.items()}, folder / WEIGHTS)


@torch.no_grad()
def merge_adapter(transformer: WanTransformer3DModel, folder: Path) -> None:
    """Add the adapters of a PEFT folder to the weights: in float32, rounded once to the weight's own precision.

    Raises UserError for a folder that is no plain LoRA of this network.
    """
    config, state = read_adapter(folder)
    layers = {name.removesuffix(_A).removesuffix(_B) for name in state}
    odd = [name for name in state if not name.endswith((_A, _B))]
    if odd or not state:
        raise UserError(f"{folder / WEIGHTS}: not a plain LoRA: {listed(odd) or 'it is empty'}")
    modules = dict(transformer.named_modules())
    for layer in sorted(layers):
        module, down, up = modules.get(layer), state.get(layer + _A), state.get(layer + _B)
        if not isinstance(module, nn.Linear) or down is None or up is None:
            raise UserError(
                f"{folder / WEIGHTS}: {layer} is not a linear layer of this student with its lora_A, lora_B"
            )
        shape = (module.out_features, module.in_features)
        if (tuple(up.shape), tuple(down.shape)) != ((shape[0], config.r), (config.r, shape[1])):
            raise UserError(
                f"{folder / WEIGHTS}: {layer} has adapters of another shape than rank {config.r} of {shape}"
            )
        delta = (config.lora_alpha / config.r) * (up.float() @ down.float())
        module.weight.data = (module.weight.float() + delta).to(module.weight.dtype)


def read_adapter(folder: Path) -> tuple[AdapterFile, dict[str, Tensor]]:
    """The adapters of a PEFT folder, named as the layers of the network.  Raises UserError."""
    try:
        config = AdapterFile.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or folder / WEIGHTS}: a part of the adapter is missing") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CONFIG}: not the description of a plain LoRA: {error}") from None
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({error}); fetch it again") from None
    return config, {name.removeprefix(_PREFIX): value for name, value in state.items()}
