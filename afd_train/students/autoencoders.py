"""Videos <-> latents.  `PixelAutoencoder` is the weight-free stand-in for a VAE in small worlds.

Videos are uint8 [B, F, H, W, 3], latents float [B, F, C, h, w].
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from afd_train.config import StudentConfig


class PixelAutoencoder:
    """Space-to-depth of centred pixels: latent = scale (pixel - centre) / 127.5, `factor` x `factor` pixels a cell.

    Lossless up to 8-bit rounding.  Centring on the background makes most of a small world 0, which a small network
    needs in order to learn at all.
    """

    def __init__(self, config: StudentConfig):
        self.factor = config.pixel_factor
        self.channels = 3 * config.pixel_factor**2
        self._scale = config.pixel_scale / 127.5
        self._centre = torch.tensor(config.pixel_centre, dtype=torch.float32)

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> float32 [B, F, 3 factor^2, H / factor, W / factor]."""
        pixels = (video.float() - self._centre.to(video.device)) * self._scale
        return rearrange(pixels, "b f (h p) (w q) c -> b f (c p q) h w", p=self.factor, q=self.factor).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse, rounded and clipped to 8 bits."""
        pixels = rearrange(latents.float(), "b f (c p q) h w -> b f (h p) (w q) c", p=self.factor, q=self.factor)
        return (pixels / self._scale + self._centre.to(latents.device)).round().clamp(0, 255).to(torch.uint8)

    def round_trip(self, latents: Tensor) -> Tensor:
        """Latents as they come back from 8-bit video.

        The teacher's clips were decoded from 8-bit files; the student's get the same treatment before a
        discriminator sees them, or it learns to spot quantisation instead of motion.
        """
        return self.encode(self.decode(latents))
