"""Wan's transformer written out plainly, as an oracle: one dense mask over all frames of a pass, and no cache.

Works in float64 and shares no code with the network that it checks.  Clips are [B, F, C, H, W], texts [B, L, D],
times [B, F].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_train.students.causal_wan import CausalWan


def stirred(net: CausalWan) -> CausalWan:
    """In place: no norm's weight is 1 and no bias is 0 any more, so that every parameter matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net


def oracle_of(net: CausalWan, window: int | None = None, sink: int = 0) -> DenseWan:
    """The oracle with a copy of the network's weights, which take gradients."""
    weights = {name: value.detach().double().requires_grad_() for name, value in net.transformer.named_parameters()}
    return DenseWan(weights, net.transformer.config["num_attention_heads"], net.chunk_frames, window, sink)


@dataclass(frozen=True)
class DenseWan:
    """weights: under diffusers' names; a chunk sees `window` frames, itself and the first `sink` ones included."""

    weights: Mapping[str, Tensor]
    heads: int
    chunk: int
    window: int | None = None
    sink: int = 0

    def sees(self, end: int, frame: int) -> bool:
        """Whether a chunk that ends before frame `end` sees a frame."""
        recent = self.window is None or frame >= end - (self.window - self.sink)
        return frame < end and (recent or frame < self.sink)

    def ends(self, frames: int, given: int = 0) -> list[int]:
        """For every frame where its chunk ends; `given` frames come before the chunks, as chunks of their own."""
        parts = [min(self.chunk, given - i) for i in range(0, given, self.chunk)]
        parts += [self.chunk] * ((frames - given) // self.chunk)
        return [sum(parts[: i + 1]) for i, part in enumerate(parts) for _ in range(part)]

    def noisy_context(
        self, x: Tensor, t: Tensor, text: Tensor, seen: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Every chunk sees the chunks before it as they are; `seen`: where keys and values are appended, by layer."""
        ends = self.ends(x.shape[1])
        mask = torch.tensor([[self.sees(end, frame) for frame in range(len(ends))] for end in ends])
        return self.velocity(x, t, text, list(range(len(ends))), mask, seen=seen)

    def clean_context(
        self,
        noisy: Tensor,
        t: Tensor,
        text: Tensor,
        clean: Tensor,
        clean_t: Tensor,
        given: int = 0,
        detached: bool = False,
    ) -> Tensor:
        """Every noisy chunk sees the clean ones before it and itself; `detached`: no gradient through clean keys."""
        ends, frames = self.ends(clean.shape[1], given), range(clean.shape[1])
        context = torch.tensor([[self.sees(end, frame) for frame in frames] for end in ends])
        own = torch.tensor([[end == other for other in ends] for end in ends])
        none = torch.zeros_like(own)
        mask = torch.cat([torch.cat([context, none], 1), torch.cat([context & ~own, own], 1)])
        x, times = torch.cat([clean, noisy], 1), torch.cat([clean_t, t], 1)
        held = len(ends) if detached else 0
        return self.velocity(x, times, text, [*frames, *frames], mask, held)[:, len(ends) :]

    def rollout(
        self,
        text: Tensor,
        noise: Iterator[Tensor],
        times: Sequence[Sequence[float]],
        prefix: Tensor | None = None,
        context_time: float = 0.0,
        context_noise: Iterator[tuple[float, Tensor]] | None = None,
    ) -> Tensor:
        """One chunk for every entry of `times`; the network sees all frames again at every step."""
        clean, context = ([] if prefix is None else [prefix.double()] for _ in range(2))
        given = 0 if prefix is None else prefix.shape[1]
        for index, steps in enumerate(times):
            x = next(noise).double()
            for now, after in zip(steps, [*steps[1:], None], strict=True):
                t = torch.full(x.shape[:2], now)
                before = torch.cat([*context, torch.zeros_like(x)], 1)
                noisy = torch.cat([*(torch.zeros_like(part) for part in context), x], 1)
                t_all = F.pad(t, (before.shape[1] - x.shape[1], 0))
                v = self.clean_context(noisy, t_all, text, before, torch.full_like(t_all, context_time), given)
                estimate = x - now * v[:, -x.shape[1] :]
                x = estimate if after is None else (1 - after) * estimate + after * next(noise)
            clean.append(x)
            if context_noise is not None and index + 1 < len(times):
                sigma, fresh = next(context_noise)
                x = (1 - sigma) * x + sigma * fresh
            context.append(x)
        return torch.cat(clean, 1)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        positions: list[int],
        mask: Tensor,
        detached: int = 0,
        seen: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Frame i of a pass, at `positions[i]` of the clip, sees frame j where mask[i, j].

        No gradient goes through the keys and values of the first `detached` frames.
        """
        w = {name: value.double() for name, value in self.weights.items()}
        (batch, frames), (height, width) = x.shape[:2], x.shape[3:]
        rows, columns = height // 2, width // 2
        tokens = rows * columns
        kernel = w["patch_embedding.weight"].squeeze(2)
        h = F.conv2d(x.double().flatten(0, 1), kernel, w["patch_embedding.bias"], stride=2)
        h = h.flatten(2).transpose(1, 2).reshape(batch, frames * tokens, -1)
        time, modulation = self._time(w, t, tokens)
        words = _linear(w, "condition_embedder.text_embedder.linear_1", text.double())
        words = _linear(w, "condition_embedder.text_embedder.linear_2", F.gelu(words, approximate="tanh"))
        turn = _rotation(positions, rows, columns, h.shape[-1] // self.heads)
        now = _Pass(mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1), turn, detached * tokens, seen)
        for block in range(sum(name.endswith("attn1.to_q.weight") for name in w)):
            h = self._block(w, f"blocks.{block}.", h, words, modulation, now)
        shift, scale = (w["scale_shift_table"] + time[:, :, None]).unbind(2)
        out = _linear(w, "proj_out", _norm(h) * (1 + scale) + shift)
        out = out.view(batch, frames, rows, columns, 2, 2, -1)
        return torch.einsum("bfrcpqk->bfkrpcq", out).reshape(batch, frames, -1, height, width)

    def _time(self, w: Mapping[str, Tensor], t: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """For every token: [B, N, dim] and [B, N, 6, dim]."""
        half = w["condition_embedder.time_embedder.linear_1.weight"].shape[1] // 2
        phase = 1000 * t.double()[..., None] * 10_000 ** (-torch.arange(half).double() / half)
        sinusoid = torch.cat([phase.cos(), phase.sin()], -1)
        time = F.silu(_linear(w, "condition_embedder.time_embedder.linear_1", sinusoid))
        time = _linear(w, "condition_embedder.time_embedder.linear_2", time)
        modulation = _linear(w, "condition_embedder.time_proj", F.silu(time)).unflatten(-1, (6, -1))
        return time.repeat_interleave(tokens, 1), modulation.repeat_interleave(tokens, 1)

    def _block(
        self, w: Mapping[str, Tensor], name: str, h: Tensor, words: Tensor, modulation: Tensor, now: _Pass
    ) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (w[name + "scale_shift_table"] + modulation).unbind(2)
        x = _norm(h) * (1 + scale) + shift
        h = h + gate * self._attention(w, name + "attn1.", x, x, now)
        x = _norm(h) * w[name + "norm2.weight"] + w[name + "norm2.bias"]
        h = h + self._attention(w, name + "attn2.", x, words, None)
        x = _linear(w, name + "ffn.net.0.proj", _norm(h) * (1 + scale2) + shift2)
        return h + gate2 * _linear(w, name + "ffn.net.2", F.gelu(x, approximate="tanh"))

    def _attention(self, w: Mapping[str, Tensor], name: str, x: Tensor, seen: Tensor, now: _Pass | None) -> Tensor:
        query = _rms(_linear(w, name + "to_q", x)) * w[name + "norm_q.weight"]
        key = _rms(_linear(w, name + "to_k", seen)) * w[name + "norm_k.weight"]
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (query, key, _linear(w, name + "to_v", seen)))
        if now is not None:
            q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) * now.turn for y in (q, k))
            q, k = (torch.view_as_real(y).flatten(3) for y in (q, k))
            if now.seen is not None:
                now.seen.append((k, v))
            k, v = (torch.cat([y[:, : now.held].detach(), y[:, now.held :]], 1) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if now is not None:
            scores = scores.masked_fill(~now.mask, -torch.inf)
        return _linear(w, name + "to_out.0", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


@dataclass(frozen=True)
class _Pass:
    """What self-attention needs to know: [N, N] who sees whom, [N, 1, head / 2] rotation, keys without
    gradient, where keys and values are appended.
    """

    mask: Tensor
    turn: Tensor
    held: int
    seen: list[tuple[Tensor, Tensor]] | None


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def _norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _rotation(positions: list[int], rows: int, columns: int, head: int) -> Tensor:
    """Complex [N, 1, head / 2]: what multiplies the pairs of a token's queries and keys."""
    space = 2 * (head // 6)
    places = torch.tensor([(f, r, c) for f in positions for r in range(rows) for c in range(columns)]).double()
    angles = [
        places[:, axis : axis + 1] * 10_000 ** (-torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate((head - 2 * space, space, space))
    ]
    return torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(angles, 1))[:, None]
