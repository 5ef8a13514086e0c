"""What pre-trained networks that discriminators stand on take: arithmetic on their config.json.  Torch-free.

Where that is not in a folder on this machine the sizes are those of the networks that recipes name by default, V-JEPA 2
ViT-L and Qwen2-VL-2B.  What a layer saves for its backward pass was counted on the running code, tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from afd_train.discriminator_config import VJepa2Config, VlmConfig

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
VJEPA2 = {
    "hidden_size": 1024, "num_hidden_layers": 24, "mlp_ratio": 4, "crop_size": 256, "patch_size": 16,
    "tubelet_size": 2,
}  # fmt: skip
QWEN2_TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151_936,
}  # fmt: skip
QWEN2_VISION = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip


class TrunkCost(NamedTuple):
    """Of a network, and of one clip that passes through it.

    frozen, adapters: parameters; dim: of a token; steps: tokens in time; saved: bytes that a layer saves of a token for
    the backward pass of its adapters; passing: bytes of a clip at the widest place; linears, attention: floating-point
    operations of the layers with adapters; before: of what comes before them, which is never adapted.
    """

    frozen: int
    adapters: int
    layers: int
    dim: int
    steps: int
    tokens: int
    saved: int
    passing: int
    linears: float
    attention: float
    before: float = 0


def vjepa2_trunk(config: VJepa2Config) -> TrunkCost:
    """V-JEPA 2's encoder."""
    about = _sizes(_about(config.path), VJEPA2)
    dim, layers, size = about["hidden_size"], about["num_hidden_layers"], DTYPE_BYTES[config.dtype]
    ffn = int(dim * about["mlp_ratio"])
    steps = config.frames // about["tubelet_size"]
    tokens = steps * (about["crop_size"] // about["patch_size"]) ** 2
    embed = 3 * about["tubelet_size"] * about["patch_size"] ** 2 * dim + dim
    layer = 4 * linear(dim, dim) + linear(dim, ffn) + linear(ffn, dim) + 4 * dim
    return TrunkCost(
        frozen=embed + layers * layer + 2 * dim,
        adapters=layers * config.rank * (8 * dim + 2 * (dim + ffn)),
        layers=layers,
        dim=dim,
        steps=steps,
        tokens=tokens,
        saved=size * (9 * dim + 2 * ffn + 6 * config.rank),
        passing=size * tokens * (4 * dim + 2 * ffn),
        linears=2.0 * layers * tokens * (4 * dim**2 + 2 * dim * ffn),
        attention=layers * attention(tokens, tokens, dim),
        before=2.0 * tokens * embed,
    )


def qwen2_vl_trunk(config: VlmConfig, height: int, width: int, words: int) -> TrunkCost:
    """Qwen2-VL on clips of height x width pixels and `words` tokens of text."""
    about = _about(config.path)
    text, vision = (
        _sizes(about.get("text_config") or about, QWEN2_TEXT),
        _sizes(about.get("vision_config"), QWEN2_VISION),
    )
    dim, ffn, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    narrow, size = dim // text["num_attention_heads"] * text["num_key_value_heads"], DTYPE_BYTES[config.dtype]
    tall, wide = config.frame_size(height, width, vision["patch_size"] * vision["spatial_merge_size"])
    a_frame = (tall // vision["patch_size"]) * (wide // vision["patch_size"])
    steps = config.frames // vision["temporal_patch_size"]
    patches = steps * a_frame
    tokens = patches // vision["spatial_merge_size"] ** 2 + words
    layer = 2 * dim**2 + 2 * dim * narrow + 3 * dim * ffn
    beside = dim + 2 * narrow + 2 * dim  # biases and norms
    embed, merged = vision["embed_dim"], vision["embed_dim"] * vision["spatial_merge_size"] ** 2
    block = (4 + 2 * vision["mlp_ratio"]) * embed**2
    merger = merged**2 + merged * dim
    tower = vision["depth"] * (block + (9 + vision["mlp_ratio"]) * embed) + merger + merged + dim + 2 * embed
    tower += 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2 * embed
    seeing = vision["depth"] * (2.0 * patches * block + attention(patches, a_frame, embed))
    return TrunkCost(
        frozen=text["vocab_size"] * dim + layers * (layer + beside) + dim + tower,
        adapters=layers * config.rank * (4 * dim + 2 * (dim + narrow) + 3 * (dim + ffn)),
        layers=layers,
        dim=dim,
        steps=steps,
        tokens=tokens,
        saved=size * (7 * dim + 4 * ffn + 7 * config.rank) + 2 * FLOAT32 * dim,
        passing=size * max(patches * (6 + 2 * vision["mlp_ratio"]) * embed, tokens * (6 * dim + 3 * ffn)),
        linears=2.0 * layers * tokens * layer,
        attention=layers * attention(tokens, tokens, dim),
        before=seeing + 2.0 * patches // vision["spatial_merge_size"] ** 2 * merger,
    )


def attention(queries: float, keys: float, dim: int) -> float:
    """Floating-point operations of attention, its linear layers left out."""
    return 4 * queries * keys * dim


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with bias."""
    return inputs * outputs + outputs


def _about(path: str) -> dict[str, Any]:
    """The config.json of a folder on this machine; empty where there is none, which training will say."""
    try:
        found = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(found: Any, default: Mapping[str, int]) -> dict[str, int]:
    given = found if isinstance(found, dict) else {}
    return {key: given[key] if isinstance(given.get(key), int | float) else value for key, value in default.items()}
