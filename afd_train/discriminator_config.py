"""The discriminator's section of a recipe: which network judges, how it learns, and what keeps it informative.

Torch-free.  What all discriminators share stands in `Judging`; a class a network adds its own.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd_data.section import Config
from afd_train.student_config import LatentShape

Space = Literal["latents", "pixels"]  # what a discriminator's clips are


class MarginBand(Config):
    """Holds the discriminator's margin where its scores rank rollouts (the paper's figure 5).

    The running mean of the margin between teacher and student on clean clips is compared with the band after every
    step: above it the learning rate is divided by `gain`, below it multiplied, within [smallest, largest] times the
    recipe's.
    """

    low: float = Field(default=0.5, description="below: it hardly tells teacher from student; it learns faster")
    high: float = Field(default=4.0, description="above: it is too sure to rank rollouts; it learns slower")
    memory: float = Field(default=0.9, ge=0, lt=1, description="weight of the past in the margin's running mean")
    gain: float = Field(default=1.1, gt=1, description="factor of the learning rate a step outside the band")
    smallest: float = Field(default=0.1, gt=0, le=1, description="of the learning rate")
    largest: float = Field(default=4.0, ge=1, description="of the learning rate")

    @model_validator(mode="after")
    def _has_room(self) -> MarginBand:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} must be below high {self.high:g}")
        return self


class Judging(Config):
    """How any discriminator learns."""

    learning_rate: float = Field(default=1e-4, ge=0, description="while the student trains; 0 freezes it")
    weight_decay: float = Field(default=1e-2, ge=0)
    loss: Literal["bt", "bt-chunk", "logistic"] = Field(
        default="bt",
        description="bt: Bradley-Terry on pairs of one prompt (eq. 1); bt-chunk: the same, and for every chunk; "
        "logistic: the loss of a GAN, every clip on its own",
    )
    chunk_loss_weight: float = Field(default=0.5, ge=0, description="of the chunks' part of bt-chunk")
    input_noise: float = Field(
        default=0.8, ge=0, description="largest standard deviation of the noise added to its input while it trains"
    )
    mismatch_weight: float = Field(
        default=0.0,
        ge=0,
        description="of a second comparison, with the teacher's video of another prompt in the student's place: pairs "
        "of one prompt alone give no reason to read it (discriminator/prompt_accuracy tells)",
    )
    r1_weight: float = Field(
        default=0.0, ge=0, description="penalty on |dD/dx|^2 at the teacher's clips, by finite differences"
    )
    r1_step: float = Field(default=0.05, gt=0, description="standard deviation of the difference's random direction")
    confidence: float | None = Field(
        default=None,
        gt=0,
        description="weigh a pair by how sure it is that the teacher's clip is good, sigmoid((D(teacher) - mean of "
        "the prompt's rollouts) / this), so that bad clips of the teacher teach less; default: all alike",
    )
    warmup_steps: int = Field(default=100, ge=0, description="updates on cached base rollouts before the student moves")
    warmup_learning_rate: float = Field(default=1e-3, gt=0)
    warmup_prompts: int = Field(default=32, ge=1, description="distinct prompts in a warm-up batch")
    warmup_patience: int | None = Field(
        default=None,
        ge=1,
        description="end the warm-up when the loss on held-out pairs has not improved for so many steps",
    )
    band: MarginBand | None = Field(default=None, description="control of the learning rate by the margin; default off")

    @property
    def space(self) -> Space:
        """What it looks at."""
        return "latents"

    @property
    def per_chunk(self) -> bool:
        """Whether it scores every chunk."""
        return False

    @property
    def references(self) -> bool:
        """Whether it looks at another take of the prompt beside the clip."""
        return False

    @property
    def teacher_clips(self) -> int:
        """Clips of the teacher that it learns from, an example: its own, another prompt's, and its own moved."""
        return 1 + (self.mismatch_weight > 0) + (self.r1_weight > 0)

    def problem_with(self, shape: LatentShape, chunk_frames: int) -> str | None:
        """Why clips of this shape cannot be judged, as `KEY: reason` within the section; None if they can."""
        if self.loss == "bt-chunk" and not self.per_chunk:
            return "loss: bt-chunk needs a discriminator that scores every chunk (spacetime with chunk_causal=true)"
        return None


class SpaceTimeConfig(Judging):
    """Small space-time transformer over latents."""

    name: Literal["spacetime"] = "spacetime"
    dim: int = Field(default=96, ge=8)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=2, ge=1)
    patch: int = Field(default=1, ge=1, description="latent pixels a side of a token")
    tubelet_frames: int = Field(default=2, ge=1, description="latent frames of a token")
    chunk_causal: bool = Field(
        default=False, description="score every chunk from it and the chunks before it, instead of the clip as a whole"
    )
    reference: bool = Field(
        default=False, description="also look at another take of the same prompt by the teacher (cache.takes >= 2)"
    )
    look_back: bool = Field(
        default=False, description="a token also holds what its place showed a step before, so that it sees motion"
    )
    view: Literal["latents", "luminance", "luminance-differences"] = Field(
        default="latents",
        description="what it sees: latents as they are; luminance: without colour, each clip normalised; "
        "luminance-differences: of those what changes from frame to frame, which a renderer's style does not reach "
        "(student.autoencoder pixels)",
    )

    @property
    def per_chunk(self) -> bool:
        """Whether it scores every chunk."""
        return self.chunk_causal

    @property
    def references(self) -> bool:
        """Whether it looks at another take of the prompt beside the clip."""
        return self.reference

    @model_validator(mode="after")
    def _shapes_fit(self) -> SpaceTimeConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim: {self.dim} is not divisible by heads {self.heads}")
        if self.chunk_causal and self.view != "latents":
            raise ValueError(f"view: {self.view} is normalised over the whole clip, which chunk_causal may not see")
        return self

    def problem_with(self, shape: LatentShape, chunk_frames: int) -> str | None:
        """See `Judging`."""
        if shape.frames % self.tubelet_frames:
            return f"tubelet_frames: {self.tubelet_frames} does not divide the {shape.frames} latent frames of a clip"
        if shape.width % self.patch or shape.height % self.patch:
            return f"patch: {self.patch} does not divide the {shape.width} x {shape.height} latent pixels of a clip"
        if self.view != "latents" and shape.channels % 3:
            return f"view: {self.view} is of latents that are pixels (student.autoencoder=pixels); set it to latents"
        if self.chunk_causal and chunk_frames % self.tubelet_frames:
            return f"tubelet_frames: {self.tubelet_frames} does not divide the {chunk_frames} latent frames of a chunk"
        return super().problem_with(shape, chunk_frames)


class FeaturesConfig(Judging):
    """The frozen starting student's features of the clip, and a small head."""

    name: Literal["features"] = "features"
    dim: int = Field(default=64, ge=8, multiple_of=4, description="of the head")
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="transformer blocks whose outputs are looked at, from 0; default: the middle and last"
    )
    time: float = Field(
        default=0.1, gt=0, le=1, description="noise level in [0, 1] that the clip is given for the trunk"
    )

    def blocks_of(self, layers: int) -> tuple[int, ...]:
        """The blocks of a student with so many, rising; those that the recipe names may be more than there are."""
        return tuple(sorted(set(self.blocks or ((layers - 1) // 2, layers - 1))))


class Adapted(Judging):
    """A pre-trained network over pixels, with low-rank adapters or frozen.

    Its scores have no gradient with respect to a student's clips, which become 8-bit pixels on their way to it.
    """

    path: str = Field(description="folder of the model, or hf://...")
    frames: int = Field(ge=2, description="evenly spaced frames of a clip that it sees")
    train: Literal["frozen", "lora"] = Field(default="lora", description="the trunk: frozen, or adapted by LoRA")
    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128.0, gt=0, description="adapters' output is scaled by alpha / rank")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of the trunk's weights")
    gradient_checkpointing: bool = Field(default=False, description="less memory for a third more time")

    @property
    def space(self) -> Space:
        """See `Judging`."""
        return "pixels"


class VJepa2Config(Adapted):
    """V-JEPA 2 features of the pixels, and cross-attention to the prompt."""

    name: Literal["vjepa2"] = "vjepa2"
    path: str = Field(default="hf://facebook/vjepa2-vitl-fpc64-256", description="folder of the model, or hf://...")
    frames: int = Field(default=16, ge=2, description="evenly spaced frames of a clip that it sees")
    dim: int = Field(default=256, ge=8, multiple_of=4, description="of the head")


class VlmConfig(Adapted):
    """The paper's: Qwen2-VL with LoRA and a reward head, the prompt before the reward token."""

    name: Literal["vlm"] = "vlm"
    path: str = Field(default="hf://Qwen/Qwen2-VL-2B-Instruct", description="folder of the model, or hf://...")
    frames: int = Field(default=10, ge=2, description="evenly spaced frames of a clip that it sees")
    frame_pixels: int = Field(default=200_704, ge=784, description="largest area of a frame, 448 x 448")
    instruction: str = Field(
        default="Judge how physically plausible and how true to its prompt this video is.",
        description="what stands between the prompt and the reward token",
    )

    def frame_size(self, height: int, width: int, cell: int) -> tuple[int, int]:
        """(height, width) of the frames that it sees: multiples of `cell` pixels, at least one, within the area."""
        shrink = min(1.0, math.sqrt(self.frame_pixels / (height * width)))
        tall, wide = (max(1, math.floor(side * shrink / cell)) * cell for side in (height, width))
        return tall, wide


DiscriminatorConfig = Annotated[
    SpaceTimeConfig | FeaturesConfig | VJepa2Config | VlmConfig, Field(discriminator="name")
]
