"""Students: a causal network with its sampler, autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_train.rollout import ClipNoise, Rollout, Sampler, rollout, rollout_chunks
from afd_train.student_config import StudentConfig
from afd_train.students.autoencoders import open_autoencoder
from afd_train.students.causal_wan import CausalWan, cast_weights
from afd_train.students.spans import Window
from afd_train.students.text import open_text_encoder

# How a student draws; what may change without another network.
SAMPLER = ("steps", "first_chunk_steps", "shift", "window", "sink", "context_noise", "renoised_context")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        self.autoencoder = open_autoencoder(self.config)
        self.text = open_text_encoder(self.config)
        self.shape = self.config.latent_shape(self.video)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def chunks(self) -> int:
        """Chunks of a clip."""
        return self.shape.frames // self.config.chunk_frames

    def sample_as(self, config: StudentConfig) -> None:
        """From here on, draw as `config` says."""
        self.config = self.config.model_copy(update={key: getattr(config, key) for key in SAMPLER})
        self.net.window = Window(self.config.window, self.config.sink)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[P] texts -> [P, L, D] on the network's device."""
        return self.text.encode(prompts).to(self.device)

    def noise(self, clips: Sequence[Clip]) -> ClipNoise:
        """The noise that draws these clips."""
        shape = (self.config.chunk_frames, *self.shape[1:])
        return ClipNoise.of([(clip.prompt_id, clip.seed, clip.take) for clip in clips], shape, self.device)

    def rollout(self, clips: Sequence[Clip], text: Tensor | None = None, training: bool = False) -> Rollout:
        """Draw a batch of clips as latents; `text`, [P, L, D] for groups of equal size, saves encoding it again.

        `training`: as rollouts to learn from are drawn (see `Sampler.of`).
        """
        text = self.encode_text([clip.prompt for clip in clips]) if text is None else text
        return rollout(self.net, text, self.noise(clips), Sampler.of(self.config, training), self.chunks)

    def videos(self, prompts: Sequence[tuple[str, str]], seed: int, takes: int, batch: int = 64) -> np.ndarray:
        """Videos of (prompt id, text) pairs: uint8 [P, takes, F, H, W, 3].  Independent of `batch`."""
        clips = [Clip(key, text, seed, take) for key, text in prompts for take in range(takes)]
        parts = [
            self.autoencoder.decode(self.rollout(clips[i : i + batch]).clips).cpu().numpy()
            for i in range(0, len(clips), batch)
        ]
        videos = np.concatenate(parts)
        return videos.reshape(len(prompts), takes, *videos.shape[1:])

    def stream(self, clip: Clip, chunks: int | None = None, image: Tensor | None = None) -> Iterator[np.ndarray]:
        """One video as it comes: uint8 [n, H, W, 3] after [n, H, W, 3]; may be longer than a clip.

        `image`: the first pixel frame, uint8 [H, W, 3], which counts as the first chunk.  Raises UserError where a
        chunk has more than one latent frame.
        """
        if image is not None and self.config.chunk_frames > 1:
            raise UserError(
                f"this student draws {self.config.chunk_frames} latent frames together, which one image cannot begin; "
                "frame-wise students (student.chunk_frames 1) can"
            )
        text = self.encode_text([clip.prompt])
        self.text.release()  # of 11 GB, next to a network that draws for long
        count = self.chunks if chunks is None else chunks
        sampler, decode = Sampler.of(self.config, training=False), self.autoencoder.stream()
        window = self.config.window
        total = count * self.config.chunk_frames
        cache = self.net.memory(total if window is None else min(window, total))
        if image is not None:
            first = self.autoencoder.encode(image[None, None].to(self.device))
            self.net.remember(first, text, cache, sampler.context_time)
            yield decode(first)[0].cpu().numpy()
            count -= 1
        for chunk in rollout_chunks(self.net, text, self.noise([clip]), sampler, count, cache):
            yield decode(chunk.clean)[0].cpu().numpy()


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def causal_net(transformer: WanTransformer3DModel, config: StudentConfig) -> CausalWan:
    """The transformer made causal as this student wants it."""
    return CausalWan(transformer, config.chunk_frames, config.prediction, Window(config.window, config.sink))


def new_student(config: StudentConfig, video: VideoConfig, seed: int) -> Student:
    """A student with random weights that follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = new_transformer(config)
    return Student(causal_net(cast_weights(transformer, DTYPES[config.dtype]), config), config, video)
