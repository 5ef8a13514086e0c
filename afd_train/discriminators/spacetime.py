"""A small transformer over the space-time patches of a latent clip and the words of its prompt.

It declares its space: latents as they come back from 8-bit video (`PixelAutoencoder.round_trip`), for the teacher's
and the student's clips alike.  A lossy cache adds the codec's traces to the teacher's side: small videos are cached
lossless (`video.lossless`).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from afd_train.config import DiscriminatorConfig


class SpaceTime(nn.Module):
    """Scores clips: [B, F, C, h, w] latents and [B, L, D] text -> [B]; higher is more like the teacher."""

    def __init__(
        self,
        config: DiscriminatorConfig,
        frames: int,
        channels: int,
        height: int,
        width: int,
        text_dim: int,
        seed: int,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch, self.tubelet = config.patch, config.tubelet_frames
            rows, columns = height // config.patch, width // config.patch
            self.embed = nn.Linear(channels * config.patch**2 * config.tubelet_frames, config.dim)
            self.embed_text = nn.Linear(text_dim, config.dim)
            self.time = nn.Parameter(0.02 * torch.randn(frames // config.tubelet_frames, 1, 1, config.dim))
            self.place = nn.Parameter(0.02 * torch.randn(1, rows, columns, config.dim))
            self.readout = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
            layer = nn.TransformerEncoderLayer(
                config.dim,
                config.heads,
                4 * config.dim,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.blocks = nn.TransformerEncoder(
                layer, config.layers, nn.LayerNorm(config.dim), enable_nested_tensor=False
            )
            # The encoder starts as copies of one layer; fresh weights for each.
            for block in self.blocks.layers:
                for weight in block.parameters():
                    if weight.ndim > 1:
                        nn.init.xavier_uniform_(weight)
            self.score = nn.Linear(config.dim, 1)

    def forward(self, clips: Tensor, text: Tensor) -> Tensor:
        """[B, F, C, h, w], [B, L, D] -> [B]."""
        sizes = {"p": self.patch, "q": self.patch, "r": self.tubelet}
        patches = rearrange(clips, "b (f r) c (h p) (w q) -> b f h w (r c p q)", **sizes)
        tokens = (self.embed(patches) + self.time + self.place).flatten(1, 3)
        readout = self.readout.expand(len(clips), -1, -1)
        seen = self.blocks(torch.cat([readout, tokens, self.embed_text(text)], 1))
        return self.score(seen[:, 0]).squeeze(-1)
