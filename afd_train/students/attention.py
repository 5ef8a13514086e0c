"""Attention over folded frames: the key-value cache, the rotary table, and the two processors of Wan's blocks.

Keys and values are [B, tokens, heads, head_dim], keys stored after the rotary embedding at absolute positions; T =
tokens of a latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from afd_train.students.spans import Span


@dataclass
class KVCache:
    """Keys and values of the clean frames so far, one pair a layer, and of the text.  Written under no_grad only.

    `capacity` latent frames have a slot.  Where that is a window's length and more frames come, the oldest behind the
    sink are overwritten: keys carry their absolute positions, so their order in memory means nothing.
    """

    capacity: int
    sink: int = 0
    frames: int = 0  # clean frames remembered: the absolute position of the next
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, capacity T, heads, head_dim]
    values: dict[int, Tensor] = field(default_factory=dict)
    text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> text keys, values

    def slot(self, frame: int) -> int:
        """Where the keys of an absolute frame stand."""
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.capacity - self.sink)

    def write(self, layer: int, key: Tensor, value: Tensor, tokens: int) -> None:
        """Put the keys and values of the frames from `self.frames` on, [B, n T, heads, head_dim], into their slots."""
        slots = [self.slot(self.frames + i) for i in range(key.shape[1] // tokens)]
        for store, new in ((self.keys, key), (self.values, value)):
            if layer not in store:
                store[layer] = new.new_empty(new.shape[0], self.capacity * tokens, *new.shape[2:])
            for first, place, count in _runs(slots):
                source = new[:, first * tokens : (first + count) * tokens]
                store[layer][:, place * tokens : (place + count) * tokens] = source


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive slots together: (index of the first, its slot, how many)."""
    runs: list[tuple[int, int, int]] = []
    for index, slot in enumerate(slots):
        if runs and slot == runs[-1][1] + runs[-1][2]:
            first, place, count = runs[-1]
            runs[-1] = first, place, count + 1
        else:
            runs.append((index, slot, 1))
    return runs


@dataclass(frozen=True)
class Pass:
    """What one forward pass attends to."""

    frames: int
    turn: Tensor  # [frames T, head_dim / 2], complex
    spans: tuple[Span, ...]
    cache: KVCache | None = None
    write: bool = False  # own keys and values into the cache before attention


@lru_cache(maxsize=32)
def rotary_table(positions: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """cos + i sin, [F height width, head_dim / 2] in complex64, for frames at absolute `positions` (F of them).

    Wan's split of a head of size d: 2 (d // 6) each for height and width, the rest for time; theta 10,000.
    """
    space = 2 * (head_dim // 6)
    shape = (len(positions), height, width)
    angles = []
    places = (torch.tensor(positions), torch.arange(height), torch.arange(width))
    for axis, (place, dim) in enumerate(zip(places, (head_dim - 2 * space, space, space), strict=True)):
        rates = 10_000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        angle = place.double()[:, None] * rates
        along = [1, 1, 1, -1]
        along[axis] = shape[axis]
        angles.append(angle.view(along).expand(*shape, -1))
    angle = torch.cat(angles, 3).flatten(0, 2)
    return torch.complex(angle.cos().float(), angle.sin().float()).to(device)


class CausalRope(nn.Module):
    """Hands the pass in progress to every block, where the stock module hands rotary tables."""

    def __init__(self, current: list[Pass]):
        super().__init__()
        self._pass = current

    def forward(self, hidden_states: Tensor) -> Pass:
        """The stock forward passes what this returns to attn1's processor as `rotary_emb`."""
        return self._pass[0]


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs.  x: [B, N, heads, d]; turn: [N, d / 2], complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).type_as(x)


def _heads(x: Tensor, attn: WanAttention, batch: int) -> Tensor:
    """[B F, T, heads d] -> [B, F T, heads, d]."""
    return x.reshape(batch, -1, attn.heads, x.shape[-1] // attn.heads)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All [B, N, heads, d]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _projected(x: Tensor, attn: WanAttention, like: Tensor) -> Tensor:
    """[B, F T, heads, d] -> the output projection of [B F, T, heads d]."""
    return attn.to_out[1](attn.to_out[0](x.reshape(like.shape)))


class SelfAttention:
    """Attention over the frames of a pass and its cache, span by span."""

    def __init__(self, layer: int, current: list[Pass]):
        self.layer = layer
        self._pass = current

    def __call__(self, attn: WanAttention, hidden_states: Tensor, _text: None, _mask: None, rotary_emb: Pass) -> Tensor:
        now = rotary_emb
        self._pass[:] = [now]  # a checkpointed block runs again in the backward pass, outside of `_run`
        batch, tokens = hidden_states.shape[0] // now.frames, hidden_states.shape[1]
        query = _heads(attn.norm_q(attn.to_q(hidden_states)), attn, batch)
        key = _heads(attn.norm_k(attn.to_k(hidden_states)), attn, batch)
        value = _heads(attn.to_v(hidden_states), attn, batch)
        query, key = rotated(query, now.turn), rotated(key, now.turn)
        if now.cache is not None and now.write:
            now.cache.write(self.layer, key, value, tokens)
        cached = _stored(now.cache, self.layer)
        out = [
            _attention(
                query[:, span.query[0] * tokens : span.query[1] * tokens],
                *(_seen(span, own, old, tokens) for own, old in zip((key, value), cached, strict=True)),
            )
            for span in now.spans
        ]
        return _projected(out[0] if len(out) == 1 else torch.cat(out, 1), attn, hidden_states)


def _stored(cache: KVCache | None, layer: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cache is None else (cache.keys.get(layer), cache.values.get(layer))


def _seen(span: Span, own: Tensor, cached: Tensor | None, tokens: int) -> Tensor:
    """What a span sees of the cache and of the pass itself; a copy only where it is more than one piece."""
    pieces = [own[:, start * tokens : stop * tokens] for start, stop in span.own]
    if cached is not None:
        pieces = [cached[:, start * tokens : stop * tokens] for start, stop in span.cached] + pieces
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class CrossAttention:
    """Attention of all frames of a group's clips to their text, whose keys and values a cache keeps."""

    def __init__(self, layer: int, current: list[Pass]):
        self.layer = layer
        self._pass = current

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: Tensor, _mask: None, _rotary: None) -> Tensor:
        query = _heads(attn.norm_q(attn.to_q(hidden_states)), attn, text.shape[0])
        return _projected(_attention(query, *self._text(attn, text)), attn, hidden_states)

    def _text(self, attn: WanAttention, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, [P, L, heads, d]."""
        cache = self._pass[0].cache
        if knows_text(cache, self.layer):
            return cache.text[self.layer]
        key = _heads(attn.norm_k(attn.to_k(text)), attn, text.shape[0])
        value = _heads(attn.to_v(text), attn, text.shape[0])
        if cache is not None and not torch.is_grad_enabled():
            cache.text[self.layer] = key, value
        return key, value


def knows_text(cache: KVCache | None, layer: int) -> TypeGuard[KVCache]:
    """Whether a layer reads its prompt from the cache.

    What is cached carries no gradient: right for the context of an update, wrong for how it reads its prompt.
    """
    return cache is not None and layer in cache.text and not torch.is_grad_enabled()
