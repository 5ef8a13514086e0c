"""Causal Wan's sampling loop written out plainly, on a student's own weights: what its rollout is compared with.

The loop of the released students, without anything this repository does better: keys and values in memory allocated for
all frames (or a window, whose contents are moved when it is full), rotary phases in float64 complex numbers, every
frame's modulation spread over its tokens, and a pass that remembers each chunk, the last included.  It shares no code
with the network that it is compared with, only weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor

from afd_train.rollout import Noise, Sampler
from afd_train.student_config import LatentShape
from afd_train.students.causal_wan import CausalWan


@dataclass
class LayerCache:
    """Of one layer: [B, slots, heads, d]; where its tokens end, counted from the clip's first and in memory."""

    key: Tensor
    value: Tensor
    global_end: int = 0
    local_end: int = 0


class PlainLoop:
    """Draws a batch of `batch` clips of some latent shape.  Velocity prediction and clean contexts only."""

    def __init__(self, net: CausalWan, batch: int, latents: LatentShape):
        assert net.prediction == "velocity"
        assert not net.coordinates
        self.net, self.wan = net, net.transformer
        self.blocks = [block for block in self.wan.blocks if isinstance(block, WanTransformerBlock)]
        self.rows, self.columns, frames = latents.height // 2, latents.width // 2, latents.frames
        self.tokens = self.rows * self.columns
        self.heads, head_dim = self.wan.config["num_attention_heads"], self.wan.config["attention_head_dim"]
        weight = self.wan.patch_embedding.weight
        slots = (frames if net.window.frames is None else min(net.window.frames, frames)) * self.tokens
        shape = batch, slots, self.heads, head_dim
        self.caches = [LayerCache(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.blocks]
        self.texts: list[tuple[Tensor, Tensor] | None] = [None for _ in self.blocks]
        self.table = rotary_table(max(frames, self.rows, self.columns), head_dim, weight.device)

    @torch.no_grad()
    def rollout(self, text: Tensor, noise: Noise, sampler: Sampler, chunks: int) -> Tensor:
        """[B, F, C, H, W]; text: [B, L, D]."""
        assert sampler.context_noise == 0
        for layer, cache in enumerate(self.caches):
            cache.global_end = cache.local_end = 0
            self.texts[layer] = None
        done: list[Tensor] = []
        for index in range(chunks):
            times = sampler.times if index else sampler.first_times
            start = index * self.net.chunk_frames
            x = clean = noise.step()
            remembered = torch.full(x.shape[:2], sampler.context_time, device=x.device)
            for now, after in zip(times, [*times[1:], None], strict=True):
                t = torch.full(x.shape[:2], now, device=x.device)
                v = self.velocity(x, t, text, start)
                clean = (x.double() - now * v.double()).to(x.dtype)
                if after is not None:
                    x = (1 - after) * clean + after * noise.step()
            self.velocity(clean, remembered, text, start)
            done.append(clean)
        return torch.cat(done, 1)

    def velocity(self, x: Tensor, t: Tensor, text: Tensor, start: int) -> Tensor:
        """Of the frames from `start` on, whose keys and values take their place in the caches."""
        wan, (batch, frames) = self.wan, x.shape[:2]
        dtype = wan.patch_embedding.weight.dtype
        h = wan.patch_embedding(x.to(dtype).transpose(1, 2)).flatten(2).transpose(1, 2)
        embedder = wan.condition_embedder
        first = embedder.time_embedder.linear_1
        time = F.linear(sinusoid(1000 * t, first.in_features).to(first.weight.dtype), first.weight, first.bias)
        time = embedder.time_embedder.linear_2(F.silu(time)).to(dtype)
        modulation = embedder.time_proj(F.silu(time)).unflatten(2, (6, -1))
        words = F.gelu(embedder.text_embedder.linear_1(text.to(dtype)), approximate="tanh")
        words = embedder.text_embedder.linear_2(words)
        turn = self._turn(start, frames)
        for layer, block in enumerate(self.blocks):
            h = self._block(block, layer, h, modulation, words, turn, start)
        shift, scale = (wan.scale_shift_table[:, None] + time[:, :, None]).unbind(2)
        h = h.unflatten(1, (frames, self.tokens))
        h = (F.layer_norm(h.float(), h.shape[-1:], eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None]).to(dtype)
        out = wan.proj_out(h).view(batch, frames, self.rows, self.columns, 2, 2, -1)
        return torch.einsum("bfrcpqk->bfkrpcq", out).reshape(batch, frames, -1, *x.shape[3:]).float()

    def _block(
        self,
        block: WanTransformerBlock,
        layer: int,
        h: Tensor,
        modulation: Tensor,
        words: Tensor,
        turn: Tensor,
        start: int,
    ) -> Tensor:
        parts = (block.scale_shift_table[:, None] + modulation.float()).unsqueeze(3).unbind(2)
        shift, scale, gate, shift2, scale2, gate2 = parts
        grid = modulation.shape[1], self.tokens

        def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            x = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).unflatten(1, grid)
            return (x * (1 + scale) + shift).flatten(1, 2).type_as(h)

        y = self._self_attention(block.attn1, self.caches[layer], modulated(h, scale, shift), turn, start)
        h = (h.float() + (y.unflatten(1, grid) * gate).flatten(1, 2)).type_as(h)
        h = h + self._cross_attention(block.attn2, layer, block.norm2(h.float()).type_as(h), words)
        widen, narrow = cast(Any, block.ffn.net[0]).proj, block.ffn.net[2]
        y = narrow(F.gelu(widen(modulated(h, scale2, shift2)), approximate="tanh"))
        y = y.float().unflatten(1, grid) * gate2
        return (h.float() + y.flatten(1, 2)).type_as(h)

    def _self_attention(self, attn: WanAttention, cache: LayerCache, x: Tensor, turn: Tensor, start: int) -> Tensor:
        query = turned(self._heads(attn.norm_q(attn.to_q(x))), turn)
        key = turned(self._heads(attn.norm_k(attn.to_k(x))), turn)
        value = self._heads(attn.to_v(x))
        count, slots, end = x.shape[1], cache.key.shape[1], start * self.tokens + x.shape[1]
        evicted = cache.local_end + end - cache.global_end - slots
        if end > cache.global_end and evicted > 0:
            sink = self.net.window.sink * self.tokens
            kept = cache.local_end - evicted - sink
            for store in (cache.key, cache.value):
                store[:, sink : sink + kept] = store[:, sink + evicted : sink + evicted + kept].clone()
            cache.local_end -= evicted
        cache.local_end += end - cache.global_end
        cache.global_end = end
        cache.key[:, cache.local_end - count : cache.local_end] = key
        cache.value[:, cache.local_end - count : cache.local_end] = value
        return attn.to_out[0](attention(query, cache.key[:, : cache.local_end], cache.value[:, : cache.local_end]))

    def _cross_attention(self, attn: WanAttention, layer: int, x: Tensor, words: Tensor) -> Tensor:
        stored = self.texts[layer]
        if stored is None:
            stored = self._heads(attn.norm_k(attn.to_k(words))), self._heads(attn.to_v(words))
            self.texts[layer] = stored
        return attn.to_out[0](attention(self._heads(attn.norm_q(attn.to_q(x))), *stored))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1))

    def _turn(self, start: int, frames: int) -> Tensor:
        """[frames T, 1, d / 2], complex."""
        dim = self.table.shape[1]
        space = 2 * dim // 6
        time, rows, columns = self.table.split([dim - 2 * space, space, space], 1)
        grid = frames, self.rows, self.columns
        parts = (
            time[start : start + frames, None, None].expand(*grid, -1),
            rows[None, : self.rows, None].expand(*grid, -1),
            columns[None, None, : self.columns].expand(*grid, -1),
        )
        return torch.cat(parts, 3).flatten(0, 2)[:, None]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, N, heads, d] each -> [B, N, heads d]."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of [B, N, heads, d] in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def rotary_table(length: int, head_dim: int, device: torch.device) -> Tensor:
    """[length, d / 2], complex: phases of time, rows and columns next to each other."""
    space = 2 * (head_dim // 6)
    phases = []
    for dim in (head_dim - 2 * space, space, space):
        rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        phases.append(torch.arange(length, dtype=torch.float64)[:, None] * rates)
    phase = torch.cat(phases, 1)
    return torch.polar(torch.ones_like(phase), phase).to(device)


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """[B, F] -> [B, F, dim], cosines first, computed in float64."""
    rates = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device).double() / (dim // 2))
    phase = t.double()[..., None] * rates
    return torch.cat([phase.cos(), phase.sin()], -1).float()
