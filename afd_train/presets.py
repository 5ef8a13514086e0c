"""Defaults of released students: what `student.preset` and `student.size` stand for.  Torch-free.

A preset gives values to the keys that a recipe leaves out, so `{preset: self-forcing, layers: 2}` is a small one.
Sources: configs and READMEs of Self-Forcing (github.com/guandeh17/Self-Forcing) and Causal-Forcing
(github.com/thu-ml/Causal-Forcing); both are causal forms of Wan2.1-T2V-1.3B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Size = Literal["1.3B", "14B"]
Preset = Literal[
    "self-forcing",
    "causal-forcing",
    "causal-forcing-framewise",
    "causal-forcing-2step",
    "causal-forcing-1step",
]

_WAN: dict[str, Any] = {"frequency_dim": 256, "text_dim": 4096, "text_tokens": 512}
SIZES: Mapping[Size, Mapping[str, Any]] = {
    "1.3B": _WAN | {"dim": 1536, "heads": 12, "layers": 30, "ffn_dim": 8960},
    "14B": _WAN | {"dim": 5120, "heads": 40, "layers": 40, "ffn_dim": 13824},
}

_FOUR_STEPS = (1000, 750, 500, 250)
# Trained on contexts that were noised again to the smallest time of the schedule, sampled on clean ones.
_CAUSAL_WAN: dict[str, Any] = {
    "size": "1.3B",
    "dtype": "bfloat16",
    "shift": 5.0,
    "renoised_context": "training",
    "autoencoder": "wan",
    "text_encoder": "umt5",
}
_CHUNKWISE: dict[str, Any] = _CAUSAL_WAN | {"chunk_frames": 3, "steps": _FOUR_STEPS}
_FRAMEWISE: dict[str, Any] = _CAUSAL_WAN | {"chunk_frames": 1, "init_key": "generator_ema"}
_CAUSAL_FORCING = "hf://zhuhz22/Causal-Forcing"
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "self-forcing": _CHUNKWISE
    | {"init": "hf://gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt", "init_key": "generator_ema"},
    "causal-forcing": _CHUNKWISE | {"init": f"{_CAUSAL_FORCING}/chunkwise/causal_forcing.pt", "init_key": "generator"},
    "causal-forcing-framewise": _FRAMEWISE
    | {"init": f"{_CAUSAL_FORCING}/framewise/causal_forcing.pt", "steps": _FOUR_STEPS},
    "causal-forcing-2step": _FRAMEWISE
    | {
        "init": f"{_CAUSAL_FORCING}/causal-forcing++/framewise-2step.pt",
        "steps": (1000, 500),
        "first_chunk_steps": _FOUR_STEPS,
    },
    "causal-forcing-1step": _FRAMEWISE
    | {
        "init": f"{_CAUSAL_FORCING}/causal-forcing++/framewise-1step.pt",
        "steps": (1000,),
        "first_chunk_steps": _FOUR_STEPS,
    },
}


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over the defaults of its `preset` and `size`, which it may name or not."""
    preset = _entry(PRESETS, given.get("preset"))
    size = _entry(SIZES, given.get("size") or preset.get("size"))
    return {**size, **preset, **given}


def _entry(table: Mapping[Any, Mapping[str, Any]], name: object) -> Mapping[str, Any]:
    # A name that is not in the table, or no name at all, is told by the section's own check.
    return table.get(name, {}) if isinstance(name, str) else {}
