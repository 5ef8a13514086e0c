"""Wan 2.1's VAE as an autoencoder of students, with a decoder that can be given a video in pieces.

Videos are uint8 [B, F, H, W, 3], latents float32 [B, f, 16, h, w], as in `autoencoders`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor

from afd_data.errors import UserError
from afd_train.hub import local_path
from afd_train.student_config import WAN_CHANNELS, WAN_FACTOR, WAN_STRIDE, StudentConfig
from afd_train.students.frozen import contents_sha256, free_memory

_KEY = "student.autoencoder_path"


class WanAutoencoder:
    """Wan 2.1's causal VAE (diffusers' `AutoencoderKLWan`), latents normalised by its own mean and deviation.

    The first latent frame is 1 pixel frame, every other one 4.  Videos are treated one by one and frame by frame, so
    that a result does not depend on its batch and the memory needed not on batch or length.

    float32 is the default although students run in bfloat16: Wan's VAE was released in it, diffusers' instructions
    keep it there, and both students' targets and all that people see pass through it once.

    Methods raise UserError: no such folder, not a Wan VAE, damaged, other channels or strides than Wan 2.1's.
    """

    def __init__(self, config: StudentConfig, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self._source = config.autoencoder_path
        self._vae: AutoencoderKLWan | None = None

    @property
    def identity(self) -> str:
        """Hash of weights and configuration, with the dtype that they are used in."""
        digest = contents_sha256(self._folder, ("config.json", "*.safetensors"))
        return f"wan-{digest[:16]}-{_name(self.dtype)}"

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B, 1 + 4 n, H, W, 3] -> the posterior's mode, normalised: float32 [B, 1 + n, 16, H / 8, W / 8].

        Raises ValueError: a size that the strides do not divide, of which the VAE would silently drop the rest.
        """
        frames, height, width = video.shape[1:4]
        if frames % WAN_STRIDE != 1 or height % WAN_FACTOR or width % WAN_FACTOR:
            raise ValueError(f"video: {frames} frames of {width}x{height}; want 1 + 4 n frames, sizes divisible by 8")
        vae = self._on(video.device)
        mean, deviation = _statistics(vae, video.device)
        latents = []
        for clip in video.split(1):
            pixels = rearrange(clip.float() / 127.5 - 1, "b f h w c -> b c f h w").to(self.dtype)
            mode = vae.encode(pixels).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
            latents.append((rearrange(mode.float(), "b c f h w -> b f c h w") - mean) / deviation)
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 1 + n, 16, h, w] -> uint8 [B, 1 + 4 n, 8 h, 8 w, 3], rounded and clipped to 8 bits."""
        # A stream for each clip: their memories, the larger part of what is needed, do not exist at the same time.
        return torch.cat([self.stream()(clip) for clip in latents.split(1)])

    def round_trip(self, latents: Tensor) -> Tensor:
        """The latents as they are.

        Through pixels and back would keep the VAE in memory all through training, and decode and encode every rollout.
        It would not be fairer either: the teacher's latents went through the encoder once, a student is trained to draw
        such latents, and decoding and encoding them again is not the identity.
        """
        return latents

    def stream(self) -> Callable[[Tensor], Tensor]:
        """A decoder with a memory of its own: any number of them can take turns."""
        return _WanStream(self._on)

    def release(self) -> None:
        """Drop the VAE from memory; open streams go on with the one that is loaded next."""
        if self._vae is not None:
            self._vae = None
            free_memory()

    @cached_property
    def _folder(self) -> Path:
        folder = local_path(self._source, _KEY)
        _check_config(folder)
        return folder

    def _on(self, device: torch.device) -> AutoencoderKLWan:
        if self._vae is None:
            self._vae = _load(self._folder, self.dtype)
        return self._vae.to(device)  # pyright: ignore[reportArgumentType]


class _WanStream:
    """Decodes latent frames as they come.  Diffusers keeps the causal convolutions' past in the VAE, which can serve
    one video at a time only; here it lies in the stream."""

    def __init__(self, vae_on: Callable[[torch.device], AutoencoderKLWan]):
        self._vae_on = vae_on
        self._memories: list[list[Any]] = []  # of each clip: the last frames that each convolution saw

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        vae = self._vae_on(latents.device)
        first = not self._memories
        if first:
            self._memories = [[None] * _convolutions(vae) for _ in range(len(latents))]
        if len(latents) != len(self._memories):
            raise ValueError(f"latents: a stream of {len(self._memories)} videos was given a chunk of {len(latents)}")
        mean, deviation = _statistics(vae, latents.device)
        videos = []
        for clip, memory in zip(latents.float() * deviation + mean, self._memories, strict=True):
            frames = []
            for number, frame in enumerate(rearrange(clip, "f c h w -> f 1 c 1 h w").to(vae.dtype)):
                hidden = vae.post_quant_conv(frame)
                pixels = vae.decoder(hidden, feat_cache=memory, feat_idx=[0], first_chunk=first and number == 0)
                levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                frames.append(rearrange(levels, "1 c f h w -> f h w c"))
            videos.append(torch.cat(frames))
        return torch.stack(videos)


def _convolutions(vae: AutoencoderKLWan) -> int:
    return sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the VAE's latents over much video: [16, 1, 1] each."""
    mean, deviation = vae.config["latents_mean"], vae.config["latents_std"]
    values = torch.tensor([mean, deviation], dtype=torch.float32, device=device)
    return values[0, :, None, None], values[1, :, None, None]


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kind = about["_class_name"]
    except FileNotFoundError:
        raise UserError(f"{_KEY}: {folder} holds no config.json. Name the vae/ of a diffusers Wan 2.1.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{_KEY}: {path} is not a configuration of diffusers ({error})") from None
    if kind != "AutoencoderKLWan":
        raise UserError(f"{_KEY}: {folder} holds a {kind}, not an AutoencoderKLWan. Name the vae/ of a Wan 2.1.")


def _load(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    try:
        loaded: Any = AutoencoderKLWan.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{_KEY}: {folder} cannot be loaded ({error}). Copy or download it again.") from None
    vae, report = loaded
    odd = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if odd:
        raise UserError(f"{_KEY}: {folder} lacks tensors or has strange ones ({len(odd)}, for example {odd[0]})")
    _check_strides(vae, folder)
    return vae.eval().requires_grad_(False)


def _check_strides(vae: AutoencoderKLWan, folder: Path) -> None:
    config = vae.config
    # From the architecture: the entries `scale_factor_*` are younger than the models, and only say so.
    factor = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
    stride = 2 ** sum(config["temperal_downsample"])
    if (config["z_dim"], stride, factor) != (WAN_CHANNELS, WAN_STRIDE, WAN_FACTOR):
        raise UserError(
            f"{_KEY}: {folder} makes latents of {config['z_dim']} channels with strides of {stride} frames and "
            f"{factor} pixels; a student needs {WAN_CHANNELS}, {WAN_STRIDE} and {WAN_FACTOR}. Name the vae/ of Wan 2.1."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
