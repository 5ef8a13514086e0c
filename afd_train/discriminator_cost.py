"""What a discriminator takes: parameters, bytes and floating-point operations a clip, by arithmetic.  Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from afd_train.config import Recipe, StudentConfig
from afd_train.discriminator_config import Adapted, FeaturesConfig, SpaceTimeConfig, VJepa2Config, VlmConfig
from afd_train.memory_parts import DTYPE_BYTES, FLOAT32, Load, parameter_count, weight_bytes
from afd_train.trunk_cost import TrunkCost, attention, linear, qwen2_vl_trunk, vjepa2_trunk

QUERIES = 4  # of the head
LETTERS = 4  # of a token of English


@dataclass(frozen=True)
class Cost:
    """Of a network, and of one clip that passes through it.

    trained: parameters, of which `rounded` are bfloat16 in the network; frozen: parameters; frozen_bytes: what they
    take; saved: bytes that a pass keeps for the backward pass; passing: bytes of one at its widest place, without;
    scoring, learning: floating-point operations without and with a backward pass; through: further bytes that are kept
    where the gradient is to reach the clip.
    """

    trained: int
    rounded: int
    frozen: int
    frozen_bytes: int
    tokens: int
    saved: int
    passing: int
    scoring: float
    learning: float
    through: int = 0


class _Head(NamedTuple):
    parameters: int
    saved: int
    operations: float


def cost_of(recipe: Recipe, load: Load) -> Cost:
    """Of the recipe's discriminator."""
    student, video = recipe.student, recipe.video
    match recipe.discriminator:
        case SpaceTimeConfig() as config:
            return _spacetime(config, load, student)
        case FeaturesConfig() as config:
            return _features(config, load, student)
        case VJepa2Config() as config:
            trunk = vjepa2_trunk(config)
            return _adapted(config, trunk, _head(trunk.steps, trunk.tokens, trunk.dim, student, config.dim))
        case VlmConfig() as config:
            # As long a prompt as the student can be given, and the instruction.
            words = student.text_tokens + len(config.instruction) // LETTERS
            trunk = qwen2_vl_trunk(config, video.height, video.width, words)
            reward = trunk.dim if config.train == "lora" else 0
            return _adapted(config, trunk, _Head(trunk.dim + reward, 0, 2 * trunk.dim))


def _spacetime(config: SpaceTimeConfig, load: Load, student: StudentConfig) -> Cost:
    """A token and layer saves 16 widths in float32."""
    shape, dim, layers = load.shape, config.dim, config.layers
    channels = shape.channels if config.view == "latents" else student.pixel_factor**2
    steps, grid = shape.frames // config.tubelet_frames, (shape.height // config.patch) * (shape.width // config.patch)
    chunks = shape.frames // student.chunk_frames if config.chunk_causal else 1
    sides = 2 if config.reference else 1
    ends = linear(channels * config.patch**2 * config.tubelet_frames, dim) + linear(student.text_dim, dim)
    places = steps + grid + chunks + (sides if config.reference else 0)
    trained = ends + places * dim + 3 * dim + 1 + layers * (12 * dim**2 + 13 * dim)
    tokens = steps * grid * sides + student.text_tokens + chunks
    each = 16 * FLOAT32 * dim * tokens
    operations = layers * (24.0 * dim**2 * tokens + attention(tokens, tokens, dim))
    return Cost(trained, 0, 0, 0, tokens, layers * each, each, operations, 3 * operations)


def _features(config: FeaturesConfig, load: Load, student: StudentConfig) -> Cost:
    """The trunk keeps nothing for a backward pass."""
    shape, dim, blocks = load.shape, student.dim, config.blocks_of(student.layers)
    kept = student.model_copy(update={"layers": blocks[-1] + 1})
    tokens, width = shape.frames * load.frame_tokens, len(blocks) * dim
    seen = load.frame_tokens * min(student.window or shape.frames, (shape.frames + student.chunk_frames) / 2)
    layer = 12 * dim**2 + 4 * dim * student.ffn_dim + attention(1, seen + student.text_tokens, dim)
    trunk = float(kept.layers * tokens * layer)
    passing = tokens * DTYPE_BYTES[student.dtype] * (11 * dim // 2 + 2 * student.ffn_dim + width)
    head = _head(shape.frames, tokens, width, student, config.dim)
    return Cost(
        trained=head.parameters,
        rounded=0,
        frozen=parameter_count(kept),
        frozen_bytes=weight_bytes(kept),
        tokens=tokens,
        saved=head.saved,
        passing=passing,
        scoring=trunk + head.operations,
        learning=trunk + 3 * head.operations,
        through=kept.layers * tokens * DTYPE_BYTES[student.dtype] * (12 * dim + 2 * student.ffn_dim),
    )


def _head(frames: int, tokens: int, width: int, student: StudentConfig, dim: int) -> _Head:
    """`PromptedHead` on so many tokens of a clip: features in float32, and 4 of its own widths."""
    places = (QUERIES + frames) * dim + linear(width, dim) + linear(student.text_dim, dim)
    attending = 8 * (dim**2 + dim) + 6 * dim
    count = places + attending + linear(QUERIES * dim, dim) + linear(dim, 1)
    saved = FLOAT32 * (tokens * (width + 4 * dim) + student.text_tokens * 4 * dim)
    return _Head(count, saved, 2.0 * tokens * (width * dim + 2 * dim**2))


def _adapted(config: Adapted, trunk: TrunkCost, head: _Head) -> Cost:
    """Adapters need the gradient of what they adapt, not that of frozen weights: one more pass of the linear layers."""
    scoring = trunk.before + trunk.linears + trunk.attention + head.operations
    learning, saved, adapters = scoring + 2 * head.operations, head.saved, 0
    if config.train == "lora":
        adapters = trunk.adapters
        own = 2.0 * adapters * trunk.tokens
        scoring += own
        learning += 3 * own + trunk.linears + 2 * trunk.attention
        live, size = trunk.layers, DTYPE_BYTES[config.dtype]
        if config.gradient_checkpointing:
            live = 1
            saved += size * trunk.layers * trunk.tokens * trunk.dim
            learning += trunk.linears + trunk.attention + own
        saved += live * trunk.tokens * trunk.saved
    return Cost(
        trained=adapters + head.parameters,
        rounded=adapters if config.dtype == "bfloat16" else 0,
        frozen=trunk.frozen,
        frozen_bytes=trunk.frozen * DTYPE_BYTES[config.dtype],
        tokens=trunk.tokens,
        saved=saved,
        passing=trunk.passing,
        scoring=scoring,
        learning=learning,
    )
