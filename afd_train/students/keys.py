"""Names of a Wan transformer's weights: those of the original code <-> those of diffusers' `WanTransformer3DModel`.

The two differ in names only; no tensor is changed, transposed or merged.  Both directions are exact inverses, new
dicts with the order of the old one.  Sources: `WanModel` of github.com/Wan-Video/Wan2.1 and
diffusers/models/transformers/transformer_wan.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor

Layout = Literal["original", "diffusers"]

# Layers with weight and bias outside of the blocks, then inside of them.
_OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_INNER = {
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # the one with weights, before cross-attention: third in the original, second in diffusers
}
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_NORMS = ("norm_q", "norm_k")  # weight only
_BLOCK = re.compile(r"(blocks\.(?:0|[1-9]\d*)\.)?(.+)", re.ASCII | re.DOTALL)


def _tables() -> tuple[dict[str, str], dict[str, str]]:
    """Whole names outside of the blocks, and what follows `blocks.N.`: original -> diffusers."""
    outer, inner = {"head.modulation": "scale_shift_table"}, {"modulation": "scale_shift_table"}
    layers = _INNER | {
        f"{attention}.{projection}": f"{_ATTENTIONS[attention]}.{_PROJECTIONS[projection]}"
        for attention in _ATTENTIONS
        for projection in _PROJECTIONS
    }
    for table, pairs in ((outer, _OUTER), (inner, layers)):
        table |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    inner |= {f"{a}.{norm}.weight": f"{b}.{norm}.weight" for a, b in _ATTENTIONS.items() for norm in _NORMS}
    return outer, inner


_TO_DIFFUSERS = _tables()
_TO_ORIGINAL = tuple({b: a for a, b in table.items()} for table in _TO_DIFFUSERS)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original names -> diffusers names.  Raises ValueError that lists names which are not the original code's."""
    return _renamed(state, "original")


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers names -> original names.  Raises ValueError that lists names which are not diffusers'."""
    return _renamed(state, "diffusers")


def layout_of(names: Iterable[str]) -> Layout:
    """Whose names these are, by majority.  Raises ValueError when none of them is known."""
    names = list(names)
    original, diffusers = (sum(_other(name, layout) is not None for name in names) for layout in _LAYOUTS)
    if not original and not diffusers:
        raise ValueError(f"not the weights of a Wan transformer: {listed(names) if names else 'nothing in it'}")
    return "original" if original > diffusers else "diffusers"


def listed(names: Iterable[str], most: int = 5) -> str:
    """`a, b, c, d, e and 7 more`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_LAYOUTS: tuple[Layout, Layout] = ("original", "diffusers")


def _renamed(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    names = {name: _other(name, layout) for name in state}
    if unknown := [name for name, other in names.items() if other is None]:
        raise ValueError(f"{len(unknown)} of {len(names)} names are unknown to {layout} Wan: {listed(unknown)}")
    return {other: state[name] for name, other in names.items() if other is not None}


def _other(name: str, layout: Layout) -> str | None:
    """The name in the other layout; None when `name` is not one of this layout."""
    outer, inner = _TO_DIFFUSERS if layout == "original" else _TO_ORIGINAL
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    block, rest = match.groups()
    other = (inner if block else outer).get(rest)
    return None if other is None else (block or "") + other
