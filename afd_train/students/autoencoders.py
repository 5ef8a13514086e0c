"""Videos <-> latents.

Videos are uint8 [B, F, H, W, 3], latents float32 [B, f, C, h, w]; what goes in says on which device the work is done.
Knows nothing of students, text or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from afd_train.student_config import StudentConfig


class Autoencoder(Protocol):
    """What turns videos into latents and back.  No method computes gradients."""

    @property
    def identity(self) -> str:
        """Names the function that `encode` is, for folders of cached latents."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> float32 [B, f, C, h, w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B, f, C, h, w] -> uint8 [B, F, H, W, 3]."""
        ...

    def round_trip(self, latents: Tensor) -> Tensor:
        """Latents of a student, prepared to be compared with latents of the teacher's 8-bit videos."""
        ...

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder of one batch of videos: given chunk after chunk [B, c, C, h, w], it returns the frames they add.

        These are uint8 [B, n, H, W, 3]; all of them together equal `decode` of all chunks together, bit for bit.
        """
        ...

    def release(self) -> None:
        """Drop the weights from memory; they are loaded again when they are needed."""
        ...


def open_autoencoder(config: StudentConfig) -> Autoencoder:
    """The autoencoder that `student.autoencoder` names.  Reads nothing yet."""
    match config.autoencoder:
        case "pixels":
            return PixelAutoencoder(config)
        case "wan":
            from afd_train.students.wan_autoencoder import WanAutoencoder

            return WanAutoencoder(config)


class PixelAutoencoder:
    """Space-to-depth of centred pixels: latent = scale (pixel - centre) / 127.5, `factor` x `factor` pixels a cell.

    The weight-free stand-in for a VAE in small worlds, lossless up to 8-bit rounding.  Centring on the background makes
    most of a small world 0, which a small network needs in order to learn at all.
    """

    def __init__(self, config: StudentConfig):
        self.factor = config.pixel_factor
        self.channels = 3 * config.pixel_factor**2
        self._scale = config.pixel_scale / 127.5
        self._centre = torch.tensor(config.pixel_centre, dtype=torch.float32)
        settings = f"{config.pixel_factor} {config.pixel_centre} {config.pixel_scale}"
        self.identity = f"pixels-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

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

    def stream(self) -> Callable[[Tensor], Tensor]:
        """Frames do not depend on each other here."""
        return self.decode

    def release(self) -> None:
        """There are no weights."""
