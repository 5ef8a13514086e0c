"""Students: a causal network with its sampler, autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from afd_data.config import VideoConfig
from afd_train.config import StudentConfig
from afd_train.flow import schedule
from afd_train.rollout import NoiseSource, Rollout, clip_generator, rollout, rollout_chunks
from afd_train.students.autoencoders import PixelAutoencoder
from afd_train.students.causal_wan import CausalWan, KVCache
from afd_train.students.text import HashedWords


@dataclass(frozen=True)
class Clip:
    """Which clip to draw: its noise follows from all but the text."""

    prompt_id: str
    prompt: str
    seed: int
    take: int


@dataclass
class Student:
    """A network and everything around it that turns prompts into videos."""

    net: CausalWan
    config: StudentConfig
    video: VideoConfig

    def __post_init__(self):
        self.autoencoder = PixelAutoencoder(self.config)
        self.text = HashedWords(self.config)
        self.times = schedule(self.config.steps, self.config.shift)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def chunks(self) -> int:
        """Chunks of a clip."""
        return self.video.frames // self.config.chunk_frames

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[B] texts -> [B, L, D] on the network's device."""
        return self.text.encode(prompts).to(self.device)

    def noise(self, clips: Sequence[Clip]) -> NoiseSource:
        """The noise that draws these clips."""
        factor = self.autoencoder.factor
        shape = (
            self.config.chunk_frames,
            self.autoencoder.channels,
            self.video.height // factor,
            self.video.width // factor,
        )
        generators = [clip_generator(clip.prompt_id, clip.seed, clip.take) for clip in clips]
        return NoiseSource(generators, shape, self.device)

    def rollout(self, clips: Sequence[Clip], text: Tensor | None = None) -> Rollout:
        """Draw a batch of clips as latents; `text` saves encoding their prompts again."""
        text = self.encode_text([clip.prompt for clip in clips]) if text is None else text
        return rollout(self.net, text, self.noise(clips), self.times, self.chunks)

    def videos(self, prompts: Sequence[tuple[str, str]], seed: int, takes: int, batch: int = 64) -> np.ndarray:
        """Videos of (prompt id, text) pairs: uint8 [P, takes, F, H, W, 3].  Independent of `batch`."""
        clips = [Clip(key, text, seed, take) for key, text in prompts for take in range(takes)]
        parts = [
            self.autoencoder.decode(self.rollout(clips[i : i + batch]).clips).cpu().numpy()
            for i in range(0, len(clips), batch)
        ]
        videos = np.concatenate(parts)
        return videos.reshape(len(prompts), takes, *videos.shape[1:])

    def stream(self, clip: Clip, chunks: int | None = None) -> Iterator[np.ndarray]:
        """One video as it comes: uint8 [chunk, H, W, 3] after [chunk, H, W, 3]; may be longer than a clip."""
        text = self.encode_text([clip.prompt])
        count = self.chunks if chunks is None else chunks
        for latents, _ in rollout_chunks(self.net, text, self.noise([clip]), self.times, count, KVCache()):
            yield self.autoencoder.decode(latents)[0].cpu().numpy()


def new_transformer(config: StudentConfig) -> WanTransformer3DModel:
    """The stock transformer of this student, with random weights from torch's generator (none on the meta device)."""
    channels = config.latent_channels
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=channels + 2 * config.coordinates,
        out_channels=channels,
        text_dim=config.text_dim,
        freq_dim=config.frequency_dim or config.dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
    )


def new_student(config: StudentConfig, video: VideoConfig, seed: int) -> Student:
    """A student with random weights that follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = new_transformer(config)
    return Student(CausalWan(transformer, config.chunk_frames, config.prediction), config, video)
