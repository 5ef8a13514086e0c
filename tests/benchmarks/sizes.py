"""What the benchmarks measure: students of three sizes with random weights, and the arithmetic that their passes take.

FLOPs are two a multiplication and addition, of the blocks' linear layers and of attention; embeddings, norms and the
text's keys are left out.  A backward pass takes the linears twice again and attention 2.5 times again; block
checkpointing takes the forward pass once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from afd_data.config import VideoConfig
from afd_train.rollout import ClipNoise, Sampler
from afd_train.student_config import LatentShape, StudentConfig
from afd_train.students import DTYPES, causal_net, new_transformer
from afd_train.students.causal_wan import CausalWan, cast_weights
from afd_train.students.spans import Span, block_causal_spans

Name = Literal["tiny", "few-layers", "1.3B"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass(frozen=True)
class Size:
    """A student, its clips and how many of them are drawn at once, each of a prompt of its own."""

    name: str
    student: StudentConfig
    video: VideoConfig
    clips: int

    @property
    def shape(self) -> LatentShape:
        """Of a latent clip."""
        return self.student.latent_shape(self.video)

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return self.shape.height // 2 * (self.shape.width // 2)

    @property
    def sampler(self) -> Sampler:
        """Of videos: finished chunks are remembered clean."""
        return Sampler.of(self.student, training=False)

    def net(self, device: torch.device) -> CausalWan:
        """With random weights; time and memory do not depend on them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformer = cast_weights(new_transformer(self.student), DTYPES[self.student.dtype])
        return causal_net(transformer, self.student).to(device).eval()

    def text(self, device: torch.device) -> Tensor:
        """[clips, L, D]"""
        shape = self.clips, self.student.text_tokens, self.student.text_dim
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

    def noise(self, device: torch.device) -> ClipNoise:
        """The same numbers every time."""
        clips = [(f"p{number}", 0, 0) for number in range(self.clips)]
        return ClipNoise.of(clips, (self.student.chunk_frames, *self.shape[1:]), device)


def size_of(name: Name) -> Size:
    """`tiny`: the quickstart's; `few-layers`: two of the 1.3B student's, on small latents; `1.3B`: 480 x 832."""
    match name:
        case "tiny":
            student = StudentConfig(ffn_dim=384, steps=(1000, 750, 500, 250))
            return Size(name, student, VideoConfig(width=16, height=16, frames=12, fps=8.0), clips=16)
        case "few-layers":
            # 24 tokens a latent frame, and of the text as many in proportion as at full size: 8.
            student = StudentConfig(preset="self-forcing", layers=2, dtype="float32", text_tokens=8)
            return Size(name, student, VideoConfig(width=96, height=64, frames=81, fps=16.0), clips=1)
        case "1.3B":
            student = StudentConfig(preset="self-forcing")
            return Size(name, student, VideoConfig(width=832, height=480, frames=81, fps=16.0), clips=1)


def linear_flops(size: Size, frames: int) -> float:
    """Of a forward pass over so many latent frames of every clip."""
    dim, ffn = size.student.dim, size.student.ffn_dim
    return 2.0 * size.student.layers * size.clips * frames * size.tokens * (6 * dim * dim + 2 * dim * ffn)


def attention_flops(size: Size, spans: Sequence[Span]) -> float:
    """Of a forward pass whose frames see what `spans` say, and the text."""
    dim, tokens = size.student.dim, size.tokens
    pairs = 0
    for span in spans:
        seen = sum(stop - start for start, stop in (*span.own, *span.cached)) * tokens + size.student.text_tokens
        pairs += (span.query[1] - span.query[0]) * tokens * seen
    return 4.0 * size.student.layers * size.clips * dim * pairs


def pass_flops(size: Size, spans: Sequence[Span]) -> float:
    """Of a forward pass."""
    return linear_flops(size, sum(span.query[1] - span.query[0] for span in spans)) + attention_flops(size, spans)


def update_flops(size: Size, spans: Sequence[Span], checkpointing: bool) -> float:
    """Of a forward and a backward pass with gradients of all weights."""
    frames = sum(span.query[1] - span.query[0] for span in spans)
    again = float(checkpointing)
    return (3 + again) * linear_flops(size, frames) + (3.5 + again) * attention_flops(size, spans)


def rollout_flops(size: Size, cached: bool = True, last_remembered: bool = False) -> float:
    """Of drawing the clips; without a cache every step runs over all chunks before it again."""
    chunk = size.student.chunk_frames
    spans = block_causal_spans(size.shape.frames, chunk)
    total = 0.0
    for index in range(len(spans)):
        steps = len(size.sampler.times if index else size.sampler.first_times)
        if not cached:
            total += steps * pass_flops(size, spans[: index + 1])
            continue
        remembered = index + 1 < len(spans) or last_remembered
        total += (steps + remembered) * pass_flops(size, spans[index : index + 1])
    return total
