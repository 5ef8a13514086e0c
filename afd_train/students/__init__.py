"""Students: a causal network with its sampler, autoencoder and text encoder, and the folder it is kept in.

A student folder holds `student.json` (the config and the clip it was made for) and `transformer/`, which stock
diffusers opens with `WanTransformer3DModel.from_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from afd_data.config import Config, VideoConfig
from afd_data.errors import UserError
from afd_data.files import atomic_folder
from afd_train.config import StudentConfig
from afd_train.flow import schedule
from afd_train.rollout import NoiseSource, Rollout, clip_generator, rollout, rollout_chunks
from afd_train.students.autoencoders import PixelAutoencoder
from afd_train.students.causal_wan import CausalWan, KVCache
from afd_train.students.text import HashedWords

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"


class StudentFile(Config):
    """`student.json`."""

    format: int = FORMAT
    student: StudentConfig
    video: VideoConfig


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


def new_student(config: StudentConfig, video: VideoConfig, seed: int) -> Student:
    """A student with random weights that follow from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = PixelAutoencoder(config)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=config.heads,
            attention_head_dim=config.dim // config.heads,
            in_channels=autoencoder.channels + 2 * config.coordinates,
            out_channels=autoencoder.channels,
            text_dim=config.text_dim,
            freq_dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.layers,
        )
    return Student(CausalWan(transformer, config.chunk_frames, config.prediction), config, video)


def save_student(student: Student, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a student folder; complete or not there at all.  `dtype` rounds the weights (bf16 halves the file)."""
    transformer = student.net.transformer
    state = {
        name: value.to("cpu", dtype or value.dtype).contiguous() for name, value in transformer.state_dict().items()
    }
    about = StudentFile(student=student.config, video=student.video)
    with atomic_folder(folder) as part:
        transformer.save_config(part / "transformer")
        (part / "transformer" / WEIGHTS).write_bytes(serialise(state, metadata={"format": "pt"}))
        (part / "student.json").write_text(about.model_dump_json(indent=1), encoding="utf-8")


def open_student(folder: Path | str) -> Student:
    """Read a student folder; `base` names the one that afd ships.  Float32 on the CPU, in evaluation mode.

    Raises UserError when the folder, its JSON or its weights are not a student's.
    """
    folder = shipped_base() if str(folder) == "base" else Path(folder)
    about = _read_about(folder)
    student = new_student(about.student, about.video, seed=0)
    state = _read_weights(folder / "transformer")
    wanted = student.net.transformer.state_dict()
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    odd = sorted(wanted.keys() ^ state.keys()) + wrong
    if odd:
        raise UserError(
            f"{folder}: the weights do not fit student.json ({len(odd)} tensors missing, unknown or of another shape, "
            f"for example {odd[0]}). Is transformer/ from another student?"
        )
    student.net.transformer.load_state_dict({name: value.float() for name, value in state.items()})
    student.net.eval()
    return student


def shipped_base() -> Path:
    """The base student of the quickstart."""
    return Path(str(resources.files("afd_recipes"))) / "base"


def _read_about(folder: Path) -> StudentFile:
    path = folder / "student.json"
    if not path.is_file():
        raise UserError(f"{folder}: no student here (student.json is missing). Name a folder that `afd train` wrote.")
    try:
        about = StudentFile.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a student's description: {error}") from None
    if about.format != FORMAT:
        raise UserError(f"{path}: format {about.format}, this afd reads {FORMAT}")
    return about


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: the weights are missing") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy the student folder again") from None
