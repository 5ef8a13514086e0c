"""What a discriminator takes of a GPU's memory and time, from arithmetic on a recipe.  Torch-free."""

from __future__ import annotations

from afd_train.config import Recipe, TrainConfig
from afd_train.discriminator_config import Adapted
from afd_train.discriminator_cost import Cost, cost_of
from afd_train.memory_parts import DTYPE_BYTES, FLOAT32, Load, Part
from afd_train.objective_config import ADVERSARIAL

WAN_VAE = 126_892_531  # parameters, float32
# What 40 % of an H100's peak is: dense bfloat16, and float32 outside of its tensor cores.
RATES = {"bfloat16": 400e12, "float32": 27e12}


def discriminator(recipe: Recipe, run: TrainConfig, load: Load) -> list[Part]:
    """Its weights, gradients and optimiser, and what brings clips into its space."""
    if run.objective.name not in ADVERSARIAL:
        return []
    cost = cost_of(recipe, load)
    # A weight in bfloat16 has a float32 master beside it.
    size = 4 * FLOAT32 * cost.trained + DTYPE_BYTES["bfloat16"] * cost.rounded
    parts = [Part("discriminator", size, f"{cost.trained / 1e6:,.1f} M parameters with gradients and Adam")]
    if cost.frozen:
        parts.append(Part("its trunk", cost.frozen_bytes, f"{cost.frozen / 1e6:,.1f} M frozen parameters"))
    if isinstance(recipe.discriminator, Adapted) and recipe.student.autoencoder == "wan":
        why = "float32, decodes clips for it; what a clip takes meanwhile is not counted"
        parts.append(Part("autoencoder", FLOAT32 * WAN_VAE, why))
    return parts


def scoring(recipe: Recipe, run: TrainConfig, load: Load) -> list[Part]:
    """What the discriminator's update needs of the clips of a pass."""
    if run.objective.name not in ADVERSARIAL:
        return []
    config, cost = recipe.discriminator, cost_of(recipe, load)
    most = run.clips_per_pass or config.warmup_prompts
    warmup = (1 + config.teacher_clips) * min(most, config.warmup_prompts) if config.warmup_steps else 0
    count = max(load.clips + config.teacher_clips * load.prompts, warmup)
    of = f"of the discriminator, {count} clips x {cost.tokens:,} tokens"
    parts = [Part("its activations", count * cost.saved, of)]
    if cost.frozen:
        parts.append(Part("its trunk's pass", count * cost.passing, f"{count} clips x {cost.tokens:,} tokens"))
    if run.objective.name == "gan":
        parts.append(Part("through its trunk", load.clips * cost.through, "for the gradient of the clips"))
    if isinstance(config, Adapted):
        parts.append(_pixels(recipe, config, count))
    return parts


def seconds(recipe: Recipe, run: TrainConfig, load: Load) -> list[str]:
    """A line on what a clip costs; none where no discriminator is used."""
    if run.objective.name not in ADVERSARIAL:
        return []
    cost, rate = cost_of(recipe, load), RATES[_dtype(recipe)]
    each = ", ".join(f"{what} {_work(work, rate)}" for what, work in _works(cost).items())
    return [f"(the discriminator, a clip: {each}; at {rate / 1e12:g} TFLOP/s, 40 % of an H100's {_dtype(recipe)})"]


def _works(cost: Cost) -> dict[str, float]:
    return {"to score": cost.scoring, "to learn from": cost.learning}


def _work(operations: float, rate: float) -> str:
    return f"{operations / 1e12:.3g} TFLOP = {operations / rate:.2g} s"


def _dtype(recipe: Recipe) -> str:
    """That most of the work is done in."""
    match recipe.discriminator:
        case Adapted(dtype=dtype):
            return dtype
    return recipe.student.dtype if recipe.discriminator.name == "features" else "float32"


def _pixels(recipe: Recipe, config: Adapted, count: int) -> Part:
    """Decoded clips, of which only the frames that are looked at become float32: clean, their noise, and both."""
    video = recipe.video
    values = 3 * video.width * video.height
    size = values * (video.frames + 3 * FLOAT32 * config.frames)
    return Part("pixels", count * size, f"{count} clips, of which {config.frames} frames are seen")
