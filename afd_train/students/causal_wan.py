"""`CausalWan`: the stock diffusers `WanTransformer3DModel` made causal by composition.

Frames are folded into the batch: the stock forward sees [B F, C, 1, H, W] with one time a frame, so that it needs no
override.  Three replaced parts put the frames together again: a rope module that hands a `Pass` to every block, a
float64 timestep module, and two attention processors (attention.py).  What a token may see is a union of contiguous
spans (spans.py), so attention is a few dense calls and no mask is ever built.

Clips are [B, F, C, H, W].  A text [P, L, D] serves P groups of B / P clips each, next to each other: rollouts of one
prompt share its keys and values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor, nn

from afd_train.flow import velocity_from_clean
from afd_train.students.attention import (
    CausalRope,
    CrossAttention,
    KVCache,
    Pass,
    SelfAttention,
    knows_text,
    rotary_table,
)
from afd_train.students.spans import (
    EVERYTHING,
    Span,
    Window,
    block_causal_spans,
    committed_spans,
    continuation_spans,
    teacher_forcing_spans,
)

Prediction = Literal["velocity", "clean"]

TRAIN_TIMESTEPS = 1000  # the transformer was trained on times in [0, 1000]; the factor lives only here


def cast_weights(transformer: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """Cast in place to diffusers' mixed layout and return: norms, modulation and time embedding stay in float32.

    The most accurate of the layouts in bfloat16 (rms error 0.6 %, all-bfloat16 0.7 %).
    """
    exact = WanTransformer3DModel._keep_in_fp32_modules or []
    for name, parameter in transformer.named_parameters():
        keep = any(part in name.split(".") for part in exact)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return transformer


class CausalWan(nn.Module):
    """Velocity of a clip, chunk-causally.

    `forward` with `clean` (teacher forcing), `chunks` (on a cache of the clean clip) and `chunk` (the next one on a
    cache of what came before) agree to rounding; `forward` without `clean` gives every chunk a noisy context.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        chunk_frames: int,
        prediction: Prediction = "velocity",
        window: Window = EVERYTHING,
    ):
        super().__init__()
        self.transformer = transformer
        self.chunk_frames = chunk_frames
        self.prediction: Prediction = prediction
        self.window = window
        self.coordinates = transformer.config["in_channels"] == transformer.config["out_channels"] + 2
        # A list, and not a module: the parts below share the pass in progress.
        self._pass: list[Pass] = []
        transformer.add_module("rope", CausalRope(self._pass))
        transformer.condition_embedder.add_module("timesteps_proj", ExactTimesteps(transformer.config["freq_dim"]))
        for layer, block in enumerate(transformer.blocks):
            assert isinstance(block, WanTransformerBlock)
            block.attn1.set_processor(SelfAttention(layer, self._pass))  # pyright: ignore[reportArgumentType]
            block.attn2.set_processor(CrossAttention(layer, self._pass))  # pyright: ignore[reportArgumentType]

    def forward(
        self, noisy: Tensor, t: Tensor, text: Tensor, clean: Tensor | None = None, clean_t: Tensor | None = None
    ) -> Tensor:
        """Velocity at `noisy`.

        noisy: [B, F, C, H, W]; t: [B, F] in [0, 1]; text: [P, L, D].  With `clean`, [B, F, C, H, W] at time `clean_t`
        (default 0), every chunk sees the clean chunks before it instead of the noisy ones; `noisy` and `t` may then
        hold K noisy versions of the clip one after the other, [B, K F, ...], which share the clean half.
        """
        if clean is None:
            frames = noisy.shape[1]
            spans = block_causal_spans(frames, self.chunk_frames, self.window)
            return self._velocity(self._run(noisy, t, text, tuple(range(frames)), spans), noisy, t)
        frames, copies = clean.shape[1], noisy.shape[1] // clean.shape[1]
        clean_t = torch.zeros_like(t[:, :frames]) if clean_t is None else clean_t
        both = torch.cat([clean, noisy], 1), torch.cat([clean_t, t], 1)
        spans = teacher_forcing_spans(frames, self.chunk_frames, copies, self.window)
        v = self._run(*both, text, tuple(range(frames)) * (1 + copies), spans)[:, frames:]
        return self._velocity(v, noisy, t)

    @torch.no_grad()
    def chunk(self, noisy: Tensor, t: Tensor, text: Tensor, cache: KVCache) -> Tensor:
        """Velocity of the next chunk, [B, chunk, C, H, W], given the clean frames in `cache`, which are not touched.

        The slots behind them serve as scratch; without gradient.
        """
        spans = committed_spans(cache.frames, noisy.shape[1], noisy.shape[1], cache.capacity, self.window)
        return self._velocity(self._run(noisy, t, text, _after(cache, noisy), spans, cache, write=True), noisy, t)

    def chunks(self, noisy: Tensor, t: Tensor, text: Tensor, cache: KVCache, first: int = 0, copies: int = 1) -> Tensor:
        """Velocity of all chunks from frame `first` on at once, each given the frames of `cache` before it.

        Equals teacher forcing with a context that carries no gradient, which is how these students are distilled, at
        half the tokens.  noisy: [B, copies n, C, H, W], `copies` noisy versions of the n frames one after the other;
        the cache holds at least the clean frames before the last of these chunks, each in a slot of its own.
        """
        frames = noisy.shape[1] // copies
        assert first + frames - self.chunk_frames <= cache.frames <= cache.capacity
        spans = continuation_spans(first, frames, self.chunk_frames, copies, self.window)
        positions = tuple(range(first, first + frames)) * copies
        return self._velocity(self._run(noisy, t, text, positions, spans, cache), noisy, t)

    @torch.no_grad()
    def remember(self, clean: Tensor, text: Tensor, cache: KVCache, t: float = 0.0) -> KVCache:
        """Append clean frames (any number of chunks, none included) to `cache` and return it.

        t: the time in [0, 1] that the network is told they have.
        """
        # Frames that overwrite others must not do so while an earlier chunk of the same pass still sees these.
        together = cache.frames + clean.shape[1] <= cache.capacity
        for part in clean.split(clean.shape[1] if together else self.chunk_frames, 1) if clean.shape[1] else ():
            spans = committed_spans(cache.frames, part.shape[1], self.chunk_frames, cache.capacity, self.window)
            times = torch.full(part.shape[:2], t, device=part.device)
            self._run(part, times, text, _after(cache, part), spans, cache, write=True)
            cache.frames += part.shape[1]
        return cache

    def memory(self, frames: int) -> KVCache:
        """An empty cache with a slot for each of `frames` latent frames."""
        return KVCache(frames, self.window.sink)

    def end_pass(self) -> None:
        """Forget the pass in progress, and with it its cache.

        To be called after a backward pass: checkpointed blocks have run in it again.
        """
        self._pass.clear()

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        positions: tuple[int, ...],
        spans: tuple[Span, ...],
        cache: KVCache | None = None,
        write: bool = False,
    ) -> Tensor:
        batch, frames = x.shape[:2]
        config = self.transformer.config
        rows, columns = (size // patch for size, patch in zip(x.shape[3:], config["patch_size"][1:], strict=True))
        turn = rotary_table(positions, rows, columns, config["attention_head_dim"], x.device)
        if self.coordinates:
            x = torch.cat([x, _coordinates(x)], 2)
        dtype = self.transformer.patch_embedding.weight.dtype
        if knows_text(cache, len(self.transformer.blocks) - 1):
            text = text[:, :0]  # no layer looks at it again, so there is nothing to embed
        self._pass[:] = [Pass(frames, turn, spans, cache, write)]
        try:
            (out,) = self.transformer(
                hidden_states=x.flatten(0, 1).unsqueeze(2).to(dtype),
                timestep=t.flatten() * TRAIN_TIMESTEPS,
                encoder_hidden_states=text.to(dtype),
                return_dict=False,
            )
        finally:
            self.end_pass()
        return out.squeeze(2).unflatten(0, (batch, frames)).float()

    def _velocity(self, output: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        match self.prediction:
            case "velocity":
                return output
            case "clean":
                return velocity_from_clean(noisy, output, t)


def _after(cache: KVCache, frames: Tensor) -> tuple[int, ...]:
    return tuple(range(cache.frames, cache.frames + frames.shape[1]))


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
