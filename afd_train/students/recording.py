"""Tensors that the original code was given and gave back, read from a folder for `parity`.

FOLDER/config.json holds the sizes of a small transformer, weights.safetensors its weights under the original's names,
tensors.safetensors everything else, named `GROUP.NAME`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from afd_data.errors import UserError
from afd_train.rollout import Sampler
from afd_train.student_config import WAN_CHANNELS, StudentConfig
from afd_train.students import causal_net, new_transformer
from afd_train.students.causal_wan import TRAIN_TIMESTEPS, CausalWan
from afd_train.students.checkpoints import load_weights, read_weights

# Our names of what config.json calls otherwise.
_SIZES = {
    "dim": "dim",
    "heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "layers": "num_layers",
    "frequency_dim": "freq_dim",
    "text_dim": "text_dim",
    "chunk_frames": "num_frame_per_block",
}
_FIXED = {"in_dim": WAN_CHANNELS, "patch_size": [1, 2, 2], "eps": 1e-6}  # same in every Wan transformer
_WINDOWS = ("local_attn_size", "window", "window_size", "window_frames")
_SINKS = ("sink_size", "sink", "sink_frames")


class MissingTensor(Exception):
    """A tensor that another one needs is not there, or holds less than it should."""


@dataclass
class Recording:
    """A folder's content; remembers which tensors were asked for."""

    config: StudentConfig
    window: dict[str, int]  # `window` and `sink` of the groups named after it
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    promised: dict[str, list[int]]  # shapes in config.json
    used: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.  Raises MissingTensor."""
        if name not in self.tensors:
            raise MissingTensor(f"{name} is missing")
        self.used.add(name)
        return self.tensors[name]

    def times(self, name: str) -> Tensor:
        """Timesteps as times in [0, 1], in float64: the rounding of a timestep shows in the output."""
        return self[name].double() / TRAIN_TIMESTEPS

    def text(self) -> Tensor:
        """Embedded prompts, padded with zeros as the original pads them: [B, L, D]."""
        embedded = self["in.prompt_embeds"]
        return F.pad(embedded, (0, 0, 0, max(0, self.config.text_tokens - embedded.shape[1])))

    def student(self, **settings: Any) -> StudentConfig:
        """The folder's student, sampled in another way."""
        return StudentConfig.model_validate(self.config.model_dump() | settings)

    def net(self, config: StudentConfig) -> CausalWan:
        """The folder's network, sampled as `config` says.  Raises UserError when the weights do not fit."""
        with torch.device("meta"):
            transformer = new_transformer(config)
        load_weights(transformer, self.weights, "weights.safetensors")
        return causal_net(transformer.eval(), config)


@dataclass(frozen=True)
class RecordedNoise:
    """Noise of a rollout, in the order of use."""

    steps: Iterator[Tensor]
    contexts: Iterator[Tensor]

    @staticmethod
    def of(starts: Tensor, injected: Tensor, sampler: Sampler, chunk: int) -> RecordedNoise:
        """The noise of all chunks.

        starts: [B, F, C, H, W], what chunks start from; injected: [n, B, chunk, C, H, W], what came in after that, in
        the order of use; the noise of the last context, which is never remembered, may be there or not.  Raises
        MissingTensor when n or the shape is another one.
        """
        chunks = starts.shape[1] // chunk
        fresh = [len(sampler.times if index else sampler.first_times) - 1 for index in range(chunks)]
        renoised = 1 if sampler.context_noise else 0
        needed = sum(fresh) + renoised * chunks
        if not needed - renoised <= len(injected) <= needed:
            raise MissingTensor(f"{needed} injected noises are needed, {len(injected)} are there")
        if needed and injected.shape[1:] != starts[:, :chunk].shape:
            raise MissingTensor(f"injected noises have shape {list(injected.shape[1:])}")
        steps, contexts, rest = [], [], iter(injected)
        for start, count in zip(starts.split(chunk, 1), fresh, strict=True):
            steps += [start, *itertools.islice(rest, count)]
            contexts += itertools.islice(rest, renoised)
        return RecordedNoise(iter(steps), iter(contexts))

    def step(self) -> Tensor:
        """For the start of a chunk and after each of its steps but the last."""
        return next(self.steps)

    def context(self) -> Tensor:
        """For a finished chunk that is noised before it is remembered."""
        return next(self.contexts)


def read_recording(folder: Path) -> Recording:
    """Read a folder.  Raises UserError when it is none, lacks a file, or weights and sizes do not fit."""
    for name in ("config.json", "tensors.safetensors", "weights.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; name a folder with recorded tensors")
    about = _read_about(folder / "config.json")
    try:
        tensors = load_file(folder / "tensors.safetensors")
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{folder / 'tensors.safetensors'}: not a readable safetensors file ({error})") from None
    weights = read_weights(folder / "weights.safetensors", None, "weights")
    recording = Recording(
        config=_student(about, folder / "config.json"),
        window=_window(about),
        weights={name: value.float() for name, value in weights.items()},
        tensors={name: tensors[name].float() for name in sorted(tensors)},
        promised=_promised(about, folder / "config.json"),
    )
    recording.net(recording.config)  # says now whether the weights fit
    return recording


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{path}: holds a {type(about).__name__}, not the sizes of a transformer")
    return about


def _student(about: Mapping[str, Any], path: Path) -> StudentConfig:
    if lacking := [name for name in _SIZES.values() if name not in about]:
        raise UserError(f"{path}: lacks {', '.join(lacking)}")
    for name, value in _FIXED.items():
        if about.get(name, value) != value:
            raise UserError(f"{path}: {name} is {about[name]}; only {value} is known")
    sizes = {ours: about[name] for ours, name in _SIZES.items()}
    sizes["text_tokens"] = about.get("text_len", 1)  # to which prompts are padded, if at all
    try:
        return StudentConfig(
            **sizes, shift=about.get("scheduler_shift", 5.0), autoencoder="wan", renoised_context="training"
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def _window(about: Mapping[str, Any]) -> dict[str, int]:
    """The first positive window that config.json names at any depth, with the sink beside it; default 3 and 1."""
    for section in _sections(about):
        windows = [section[name] for name in _WINDOWS if isinstance(section.get(name), int) and section[name] > 0]
        sinks = [section[name] for name in _SINKS if isinstance(section.get(name), int)]
        if windows:
            return {"window": windows[0], "sink": sinks[0] if sinks else 1}
    return {"window": 3, "sink": 1}


def _sections(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield section
    for value in section.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _promised(about: Mapping[str, Any], path: Path) -> dict[str, list[int]]:
    promised = about.get("tensors", {})
    if not isinstance(promised, dict) or not all(isinstance(shape, list) for shape in promised.values()):
        raise UserError(f"{path}: `tensors` is not a list of names and shapes")
    return promised
