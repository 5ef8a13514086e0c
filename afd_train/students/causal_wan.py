"""`CausalWan`: the stock diffusers `WanTransformer3DModel` made causal by composition.

Frames are folded into the batch: the stock forward sees [B F, C, 1, H, W] with one time a frame, so that it needs no
override.  Three replaced parts put the frames together again: a rope module that knows the absolute positions and
hands a `Pass` to every block, a float64 timestep module, and two attention processors.  What a token may see is a
union of contiguous spans, so attention is a few dense calls and no mask is ever built.

Layouts: clips [B, F, C, H, W]; T = tokens of a latent frame; keys and values [B, heads, tokens, head_dim], keys stored
after the rotary embedding at absolute positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn

from afd_train.flow import velocity_from_clean

Prediction = Literal["velocity", "clean"]

TRAIN_TIMESTEPS = 1000  # the transformer was trained on times in [0, 1000]; the factor lives only here


@dataclass
class KVCache:
    """Keys and values of the clean frames so far, one pair a layer, and of the text.  Written under no_grad only."""

    frames: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, heads, frames T, head_dim]
    values: dict[int, Tensor] = field(default_factory=dict)
    text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> text keys, values


@dataclass(frozen=True)
class Span:
    """Query frames [start, stop) of a pass see `visible` ranges of frames, counted over [cached; own]."""

    query: tuple[int, int]
    visible: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pass:
    """What one forward pass attends to; lives for that pass only."""

    frames: int
    cos: Tensor  # [frames T, head_dim / 2]
    sin: Tensor
    spans: tuple[Span, ...]
    cache: KVCache | None = None
    commit: bool = False


def cast_weights(transformer: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """Cast in place to diffusers' mixed layout and return: norms, modulation and time embedding stay in float32.

    The most accurate of the layouts in bfloat16 (rms error 0.6 %, all-bfloat16 0.7 %).
    """
    exact = WanTransformer3DModel._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        keep = any(part in name.split(".") for part in exact)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return transformer


def block_causal_spans(frames: int, chunk: int) -> tuple[Span, ...]:
    """Every chunk sees itself and all chunks before it."""
    return tuple(Span((i, i + chunk), ((0, i + chunk),)) for i in range(0, frames, chunk))


def teacher_forcing_spans(frames: int, chunk: int) -> tuple[Span, ...]:
    """For [clean; noisy]: clean chunks are causal, a noisy chunk sees the clean chunks before it and itself."""
    noisy = continuation_spans(frames, chunk, cached=frames)
    return block_causal_spans(frames, chunk) + tuple(
        Span((frames + span.query[0], frames + span.query[1]), span.visible) for span in noisy
    )


def continuation_spans(frames: int, chunk: int, cached: int) -> tuple[Span, ...]:
    """Noisy chunk i sees cached clean chunks 0 .. i-1 and itself; own frames stand behind the `cached` ones."""
    spans = []
    for i in range(0, frames, chunk):
        own = (cached + i, cached + i + chunk)
        spans.append(Span((i, i + chunk), ((0, i), own) if i else (own,)))
    return tuple(spans)


class CausalWan(nn.Module):
    """Velocity of a clip, chunk-causally.

    `forward` with `clean` (teacher forcing), `chunks` (all chunks on a cache of the clean clip) and `chunk` (one on a
    cache of what came before) agree to rounding; `forward` without `clean` gives every chunk a noisy context.
    """

    def __init__(self, transformer: WanTransformer3DModel, chunk_frames: int, prediction: Prediction):
        super().__init__()
        self.transformer = transformer
        self.chunk_frames = chunk_frames
        self.prediction: Prediction = prediction
        self.coordinates = transformer.config["in_channels"] == transformer.config["out_channels"] + 2
        # Lists, and not modules: the parts below share the pass in progress, and the rope belongs to the transformer.
        self._pass: list[Pass] = []
        self._rope = [CausalRope(transformer.config["attention_head_dim"], self._pass)]
        transformer.add_module("rope", self._rope[0])
        transformer.condition_embedder.add_module("timesteps_proj", ExactTimesteps(transformer.config["freq_dim"]))
        for layer, block in enumerate(transformer.blocks):
            assert isinstance(block, WanTransformerBlock)
            block.attn1.set_processor(SelfAttention(layer))  # pyright: ignore[reportArgumentType]
            block.attn2.set_processor(CrossAttention(layer, self._pass))  # pyright: ignore[reportArgumentType]

    def forward(
        self, noisy: Tensor, t: Tensor, text: Tensor, clean: Tensor | None = None, clean_t: Tensor | None = None
    ) -> Tensor:
        """Velocity at `noisy`.

        noisy: [B, F, C, H, W]; t: [B, F] in [0, 1]; text: [B, L, D].  With `clean`, [B, F, C, H, W] at time `clean_t`
        (default 0), every chunk sees the clean chunks before it instead of the noisy ones.
        """
        frames = noisy.shape[1]
        positions = torch.arange(frames, device=noisy.device)
        if clean is None:
            v = self._run(noisy, t, text, positions, block_causal_spans(frames, self.chunk_frames))
        else:
            clean_t = torch.zeros_like(t) if clean_t is None else clean_t
            both = torch.cat([clean, noisy], 1), torch.cat([clean_t, t], 1)
            spans = teacher_forcing_spans(frames, self.chunk_frames)
            v = self._run(*both, text, torch.cat([positions, positions]), spans)[:, frames:]
        return self._velocity(v, noisy, t)

    def chunk(self, noisy: Tensor, t: Tensor, text: Tensor, cache: KVCache) -> Tensor:
        """Velocity of the next chunk, [B, chunk, C, H, W], given the clean frames in `cache`, which stays as it is."""
        frames = noisy.shape[1]
        positions = torch.arange(cache.frames, cache.frames + frames, device=noisy.device)
        own = Span((0, frames), ((0, cache.frames + frames),))
        return self._velocity(self._run(noisy, t, text, positions, (own,), cache), noisy, t)

    def chunks(self, noisy: Tensor, t: Tensor, text: Tensor, cache: KVCache) -> Tensor:
        """Velocity of all chunks at once, each given the frames of `cache` before it.

        Equals teacher forcing with a context that carries no gradient, which is how these students are distilled, at
        half the tokens.  noisy: [B, F, C, H, W]; the cache holds at least the F - chunk first clean frames.
        """
        frames = noisy.shape[1]
        positions = torch.arange(frames, device=noisy.device)
        spans = continuation_spans(frames, self.chunk_frames, cache.frames)
        return self._velocity(self._run(noisy, t, text, positions, spans, cache), noisy, t)

    @torch.no_grad()
    def remember(self, clean: Tensor, text: Tensor, cache: KVCache) -> KVCache:
        """Append clean frames (any number of chunks, none included) to `cache` and return it."""
        before, frames = cache.frames, clean.shape[1]
        if frames == 0:
            return cache
        positions = torch.arange(before, before + frames, device=clean.device)
        spans = tuple(
            Span((i, i + self.chunk_frames), ((0, before + i + self.chunk_frames),))
            for i in range(0, frames, self.chunk_frames)
        )
        t = torch.zeros(clean.shape[:2], device=clean.device)
        self._run(clean, t, text, positions, spans, cache, commit=True)
        cache.frames += frames
        return cache

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        positions: Tensor,
        spans: tuple[Span, ...],
        cache: KVCache | None = None,
        commit: bool = False,
    ) -> Tensor:
        batch, frames = x.shape[:2]
        patch = self.transformer.config["patch_size"]
        cos, sin = self._rope[0].tables(positions, x.shape[3] // patch[1], x.shape[4] // patch[2])
        if self.coordinates:
            x = torch.cat([x, _coordinates(x)], 2)
        self._pass.append(Pass(frames, cos, sin, spans, cache, commit))
        try:
            (out,) = self.transformer(
                hidden_states=x.flatten(0, 1).unsqueeze(2),
                timestep=t.flatten() * TRAIN_TIMESTEPS,
                encoder_hidden_states=text,
                return_dict=False,
            )
        finally:
            self._pass.clear()
        return out.squeeze(2).unflatten(0, (batch, frames))

    def _velocity(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        match self.prediction:
            case "velocity":
                return output
            case "clean":
                return velocity_from_clean(noisy, output, t)


class CausalRope(nn.Module):
    """Rotary tables at absolute frame positions, and the hand-over of the pass to every block.

    Wan's split of a head of size d: 2 (d // 6) each for height and width, the rest for time; theta 10,000.
    """

    def __init__(self, head_dim: int, current: list[Pass]):
        super().__init__()
        self._pass = current
        space = 2 * (head_dim // 6)
        self.axes = (head_dim - 2 * space, space, space)

    def tables(self, positions: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [F height width, head_dim / 2] in float32, for frames at `positions` [F]."""
        device = positions.device
        grid = torch.meshgrid(
            positions.double(),
            torch.arange(height, device=device).double(),
            torch.arange(width, device=device).double(),
            indexing="ij",
        )
        angles = []
        for axis, dim in zip(grid, self.axes, strict=True):
            rates = 10_000.0 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
            angles.append(axis.reshape(-1, 1) * rates)
        angle = torch.cat(angles, 1)
        return angle.cos().float(), angle.sin().float()

    def forward(self, hidden_states: Tensor) -> Pass:
        """The stock forward passes what this returns to attn1's processor as `rotary_emb`."""
        return self._pass[0]


class ExactTimesteps(nn.Module):
    """Sinusoids of the time in float64 (as the original; float32 phases cost 2e-5 at the output)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        """[N] -> [N, dim], cosines first."""
        half = self.dim // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device).double() / half)
        phase = timestep.double()[:, None] * rates
        return torch.cat([phase.cos(), phase.sin()], 1).float()


def _coordinates(x: Tensor) -> Tensor:
    """Row and column of every latent pixel in [-1, 1]: [B, F, 2, H, W].

    The rotary embedding tells tokens how far apart they are, not where the floor is; a large model infers that from
    its picture, a small one in a small world does not.
    """
    batch, frames, _, height, width = x.shape
    axes = [torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype) for size in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(batch, frames, 2, height, width)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs.  x: [B, heads, N, d]; cos, sin: [N, d / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def _heads(x: Tensor, attn: WanAttention, batch: int) -> Tensor:
    """[B F, T, heads d] -> [B, heads, F T, d]."""
    return x.reshape(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)


def _folded(x: Tensor, attn: WanAttention, like: Tensor) -> Tensor:
    """[B, heads, F T, d] -> the output projection of [B F, T, heads d]."""
    x = x.transpose(1, 2).reshape(like.shape)
    return attn.to_out[1](attn.to_out[0](x))


class SelfAttention:
    """Attention over the frames of a pass (and its cache), span by span."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, attn: WanAttention, hidden_states: Tensor, _text: None, _mask: None, rotary_emb: Pass) -> Tensor:
        now = rotary_emb
        batch = hidden_states.shape[0] // now.frames
        query = _heads(attn.norm_q(attn.to_q(hidden_states)), attn, batch)
        key = _heads(attn.norm_k(attn.to_k(hidden_states)), attn, batch)
        value = _heads(attn.to_v(hidden_states), attn, batch)
        query, key = rotated(query, now.cos, now.sin), rotated(key, now.cos, now.sin)
        if now.cache is not None:
            key, value = self._with_cache(now.cache, key, value, now.commit)
        out = self._attend(query, key, value, now.spans, tokens=hidden_states.shape[1])
        return _folded(out, attn, hidden_states)

    def _with_cache(self, cache: KVCache, key: Tensor, value: Tensor, commit: bool) -> tuple[Tensor, Tensor]:
        if self.layer in cache.keys:
            key = torch.cat([cache.keys[self.layer], key], 2)
            value = torch.cat([cache.values[self.layer], value], 2)
        if commit:
            cache.keys[self.layer], cache.values[self.layer] = key, value
        return key, value

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], tokens: int) -> Tensor:
        out = []
        for span in spans:
            q = query[:, :, span.query[0] * tokens : span.query[1] * tokens]
            seen = [slice(start * tokens, stop * tokens) for start, stop in span.visible]
            k, v = (
                x[:, :, seen[0]] if len(seen) == 1 else torch.cat([x[:, :, s] for s in seen], 2) for x in (key, value)
            )
            out.append(F.scaled_dot_product_attention(q, k, v))
        return torch.cat(out, 2)


class CrossAttention:
    """Attention of all frames of a clip to its text, whose keys and values a cache keeps."""

    def __init__(self, layer: int, current: list[Pass]):
        self.layer = layer
        self._pass = current

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: Tensor, _mask: None, _rotary: None) -> Tensor:
        batch = text.shape[0]
        query = _heads(attn.norm_q(attn.to_q(hidden_states)), attn, batch)
        cache = self._pass[0].cache
        # What is cached carries no gradient: right for the context of an update, wrong for how it reads its prompt.
        if cache is not None and self.layer in cache.text and not torch.is_grad_enabled():
            key, value = cache.text[self.layer]
        else:
            key = _heads(attn.norm_k(attn.to_k(text)), attn, batch)
            value = _heads(attn.to_v(text), attn, batch)
            if cache is not None and self._pass[0].commit:
                cache.text[self.layer] = key, value
        return _folded(F.scaled_dot_product_attention(query, key, value), attn, hidden_states)
