"""A small transformer over the space-time patches of a latent clip and the words of its prompt.

Its clips are latents as they come back from 8-bit video, the teacher's and the student's alike.  A lossy cache adds the
codec's traces to the teacher's side: small videos are cached lossless (`video.lossless`).
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from afd_train.discriminator_config import SpaceTimeConfig
from afd_train.discriminators import Prompts, Space
from afd_train.student_config import LatentShape, StudentConfig


class SpaceTime(nn.Module):
    """See `Discriminator`.  With `chunk_causal` a chunk's score depends on it, the chunks before it and the prompt."""

    space: Space = "latents"
    frames: int | None = None

    def __init__(self, config: SpaceTimeConfig, shape: LatentShape, student: StudentConfig):
        super().__init__()
        self.config = config
        channels = shape.channels if config.view == "latents" else student.pixel_factor**2
        rows, columns = shape.height // config.patch, shape.width // config.patch
        self.steps = shape.frames // config.tubelet_frames
        self.chunks = shape.frames // student.chunk_frames if config.chunk_causal else 1
        self.embed = nn.Linear(channels * config.patch**2 * config.tubelet_frames, config.dim)
        self.embed_text = nn.Linear(student.text_dim, config.dim)
        self.time = nn.Parameter(0.02 * torch.randn(self.steps, 1, 1, config.dim))
        self.place = nn.Parameter(0.02 * torch.randn(1, rows, columns, config.dim))
        self.readout = nn.Parameter(0.02 * torch.randn(self.chunks, config.dim))
        # Which of two clips a token is from.
        self.side = nn.Parameter(0.02 * torch.randn(2, config.dim)) if config.reference else None
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, 4 * config.dim, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, nn.LayerNorm(config.dim), enable_nested_tensor=False)
        # The encoder starts as copies of one layer; fresh weights for each.
        for weight in self.blocks.layers.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)
        self.score = nn.Linear(config.dim, 1)
        self.register_buffer("hidden", self._hidden(rows * columns, student.text_tokens), persistent=False)

    def _hidden(self, places: int, words: int) -> Tensor | None:
        """Which token may not look at which, [N, N] of readouts, clip, words and reference; None if all see all.

        Words and reference see themselves and each other; a step of the clip also what is no later than its chunk; a
        chunk's readout is seen by nobody else.
        """
        if self.chunks == 1:
            return None
        early = -1  # the time of what everything may see
        chunk = torch.arange(self.steps) * self.chunks // self.steps
        clip = chunk.repeat_interleave(places)
        others = torch.full((words + (len(clip) if self.config.reference else 0),), early)
        readouts = torch.arange(self.chunks)
        when = torch.cat([readouts, clip, others])
        hidden = when[None, :] > when[:, None]
        hidden[:, : self.chunks] = ~torch.eye(len(when), self.chunks, dtype=torch.bool)
        return hidden

    def forward(self, clips: Tensor, prompts: Prompts, reference: Tensor | None = None) -> Tensor:
        """[B, F, C, h, w], B prompts, perhaps another clip for each -> [B, 1] or [B, chunks]."""
        pieces = [self.readout.expand(len(clips), -1, -1), self._tokens(clips, 0), self.embed_text(prompts.embeddings)]
        if self.side is not None:
            assert reference is not None
            pieces.append(self._tokens(reference, 1))
        seen = self.blocks(torch.cat(pieces, 1), mask=self.hidden)
        return self.score(seen[:, : self.chunks]).squeeze(-1)

    def _tokens(self, clips: Tensor, side: int) -> Tensor:
        sizes = {"p": self.config.patch, "q": self.config.patch, "r": self.config.tubelet_frames}
        patches = rearrange(self._viewed(clips), "b (f r) c (h p) (w q) -> b f h w (r c p q)", **sizes)
        tokens = (self.embed(patches) + self.time + self.place).flatten(1, 3)
        return tokens if self.side is None else tokens + self.side[side]

    def _viewed(self, clips: Tensor) -> Tensor:
        """[B, F, C, h, w] -> what it looks at; a view without colour has a channel a pixel of a cell."""
        if self.config.view == "latents":
            return clips
        light = reduce(clips, "b f (c s) h w -> b f s h w", "mean", c=3)
        if self.config.view == "luminance-differences":
            # The first frame has none before it: it is its own neighbour, and the count of frames stays.
            light = torch.diff(light, dim=1, prepend=light[:, :1])
        scale = light.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        return light / (scale + 1e-3)
