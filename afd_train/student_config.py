"""The student's section of a recipe: network, sampler, autoencoder and text encoder.  Torch-free."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from afd_data.config import VideoConfig
from afd_data.section import Config
from afd_train.presets import Preset, Size, with_defaults

WAN_CHANNELS, WAN_FACTOR, WAN_STRIDE = 16, 8, 4  # latents of Wan 2.1's autoencoder: channels, pixels, frames a cell


class LatentShape(NamedTuple):
    """Size of a latent clip."""

    frames: int
    channels: int
    height: int
    width: int


class StudentConfig(Config):
    """A causal few-step video model: the stock Wan transformer, its sampler, autoencoder and text encoder."""

    preset: Preset | None = Field(
        default=None, description="a released student, whose values the other keys default to"
    )
    size: Size | None = Field(default=None, description="of Wan 2.1; dim, heads, layers and the text's default to it")
    init: str | None = Field(
        default=None,
        min_length=1,
        description="start from these weights: a student folder, the name of one that afd ships "
        "(`miniature/one-step`), a diffusers folder, a .pt or .safetensors file, or hf://OWNER/REPO[@REVISION][/PATH]; "
        "default: random",
    )
    init_key: Literal["generator", "generator_ema"] | None = Field(
        default=None, description="which network of a .pt file; default: the averaged one where there is one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the weights; bfloat16 keeps norms, modulation and the time embedding in float32, as diffusers",
    )
    dim: int = Field(default=128, ge=8, description="width of the transformer")
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1)
    ffn_dim: int = Field(default=512, ge=8)
    frequency_dim: int | None = Field(default=None, ge=2, multiple_of=2, description="of a time; default: dim")
    chunk_frames: int = Field(
        default=2, ge=1, description="latent frames generated together, attending to the chunks before"
    )
    steps: tuple[int, ...] = Field(
        default=(1000,),
        min_length=1,
        description="denoising steps of a chunk, 1000 = pure noise, before the shift's warp",
    )
    first_chunk_steps: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="of the first chunk that is drawn; default: as the others"
    )
    shift: float = Field(default=5.0, gt=0, description="warp of the schedule: t = shift s / (1 + (shift - 1) s)")
    window: int | None = Field(
        default=None, ge=1, description="latent frames that a frame attends to, its own chunk included; default: all"
    )
    sink: int = Field(default=0, ge=0, description="first latent frames that stay inside the window for good")
    context_noise: int = Field(
        default=0, ge=0, le=1000, description="the time that finished chunks are remembered with, 0 = clean"
    )
    renoised_context: Literal["never", "training", "always"] = Field(
        default="never",
        description="when finished chunks are noised to that time (at least the schedule's smallest) before they are "
        "remembered: Self-Forcing does so while it trains",
    )
    prediction: Literal["velocity", "clean"] = Field(
        default="velocity",
        description="what the network's output means; Wan: velocity; small worlds learn `clean` better",
    )
    coordinates: bool = Field(
        default=False,
        description="two more input channels tell a latent pixel its place; small worlds with a floor need it",
    )
    autoencoder: Literal["pixels", "wan"] = Field(
        default="pixels", description="pixels: weight-free space-to-depth of centred pixels; wan: Wan 2.1's VAE"
    )
    autoencoder_path: str = Field(
        default="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae", description="folder of the wan autoencoder, or hf://..."
    )
    pixel_factor: int = Field(default=4, ge=1, le=16, description="pixels a side folded into channels")
    pixel_centre: tuple[int, int, int] = Field(
        default=(128, 128, 128), description="RGB that becomes 0: the background"
    )
    pixel_scale: float = Field(
        default=5.0,
        gt=0,
        description="latents are this x (pixel - centre) / 127.5; should bring them near unit variance",
    )
    text_encoder: Literal["hashed-words", "umt5"] = Field(
        default="hashed-words", description="hashed-words: a weight-free bag of words; umt5: Wan 2.1's encoder"
    )
    text_encoder_path: str = Field(
        default="hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        description="umt5: folder with text_encoder/ and tokenizer/, or hf://...",
    )
    text_tokens: int = Field(default=16, ge=1, le=512, description="words of a prompt that are kept")
    text_dim: int = Field(default=64, ge=4)

    @model_validator(mode="before")
    @classmethod
    def _preset_first(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # What this returns is validated as Python objects, where a list is no tuple.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in with_defaults(given).items()}

    @model_validator(mode="after")
    def _shapes_fit(self) -> StudentConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2 or self.dim // self.heads < 6:
            raise ValueError(f"dim: {self.dim} / heads {self.heads} must be an even number >= 6 (rotary embedding)")
        for name, steps in (("steps", self.steps), ("first_chunk_steps", self.first_chunk_steps or self.steps)):
            if any(not 0 < step <= 1000 for step in steps) or list(steps) != sorted(set(steps), reverse=True):
                raise ValueError(f"{name}: {list(steps)} must fall strictly from at most 1000 towards 0")
        if self.window is not None and self.window < self.sink + self.chunk_frames:
            raise ValueError(
                f"window: {self.window} latent frames cannot hold the sink's {self.sink} and a chunk's "
                f"{self.chunk_frames}"
            )
        if self.sink and self.window is None:
            raise ValueError("sink: means nothing without a window; set student.window")
        return self

    @property
    def latent_channels(self) -> int:
        """Of the autoencoder."""
        return WAN_CHANNELS if self.autoencoder == "wan" else 3 * self.pixel_factor**2

    def latent_shape(self, video: VideoConfig) -> LatentShape:
        """What the autoencoder makes of a clip; sizes that do not divide are rounded down."""
        wan = self.autoencoder == "wan"
        frames = 1 + (video.frames - 1) // WAN_STRIDE if wan else video.frames
        factor = WAN_FACTOR if wan else self.pixel_factor
        return LatentShape(frames, self.latent_channels, video.height // factor, video.width // factor)

    def problem_with(self, video: VideoConfig) -> str | None:
        """Why clips of this shape cannot be made, as `KEY: reason` of a recipe; None if they can."""
        name = "8" if self.autoencoder == "wan" else f"student.pixel_factor {self.pixel_factor}"
        cell = 2 * (WAN_FACTOR if self.autoencoder == "wan" else self.pixel_factor)
        frames = self.latent_shape(video).frames
        if self.autoencoder == "wan" and video.frames % WAN_STRIDE != 1:
            return f"video.frames: {video.frames} is not 1 more than a multiple of {WAN_STRIDE} (Wan's autoencoder)"
        if frames % self.chunk_frames:
            what = f"{frames} latent frames are" if frames != video.frames else f"{frames} is"
            return f"video.frames: {what} not divisible by student.chunk_frames {self.chunk_frames}"
        if video.width % cell or video.height % cell:
            return (
                f"video.width: {video.width} x {video.height} is not divisible by {cell} "
                f"(2 x {name}: pixels folded by the autoencoder, then by the transformer's patch)"
            )
        return None
