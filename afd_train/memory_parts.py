"""What a training run always keeps in a GPU's memory, from arithmetic on a recipe.  Torch-free.

`memory_phases` has what the phases of a step add.  The text encoder is not in memory while a student trains, nor the
autoencoder unless a discriminator looks at pixels (`memory_discriminators`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd_train.config import FullConfig, LoraConfig, Recipe, TrainConfig
from afd_train.objective_config import ADVERSARIAL, MATCHING, BranchConfig, policies_of
from afd_train.student_config import LatentShape, StudentConfig

PATCH = 2  # latent pixels a side of a token of Wan's transformer
FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Part:
    """Something that takes memory, and what its size follows from."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Load:
    """What one process works on: clips of a step, clips and prompts of a pass, and the size of a clip."""

    step_clips: int
    clips: int
    prompts: int
    shape: LatentShape
    frame_tokens: int
    shards: int  # processes that weights and optimiser are divided by

    @staticmethod
    def of(recipe: Recipe, run: TrainConfig, processes: int) -> Load:
        """The largest share of a step that one of `processes` has.

        Of branching a pass holds prompts: a prompt's candidates for a chunk share one context.
        """
        takes = run.rollouts_per_prompt if run.objective.name in ADVERSARIAL else 1
        group = 1 if isinstance(run.objective, BranchConfig) else takes
        prompts = math.ceil(run.prompts_per_step / processes)
        limit = None if run.objective.name in MATCHING else run.clips_per_pass  # these draw all clips at once
        clips = min(limit or prompts * group, prompts * group)
        shape = recipe.student.latent_shape(recipe.video)
        return Load(
            step_clips=prompts * takes,
            clips=clips,
            prompts=math.ceil(clips / group),
            shape=shape,
            frame_tokens=(shape.height // PATCH) * (shape.width // PATCH),
            shards=processes if run.shard == "always" else 1,
        )


def parameter_count(student: StudentConfig) -> int:
    """Parameters of the transformer (Wan 2.1's; 1,418,996,800 at 1.3B)."""
    dim, ffn, out = student.dim, student.ffn_dim, student.latent_channels * PATCH**2
    channels = student.latent_channels + (2 if student.coordinates else 0)
    block = 8 * _linear(dim, dim) + 6 * dim + _linear(dim, ffn) + _linear(ffn, dim) + 6 * dim
    ends = _linear(channels * PATCH**2, dim) + _linear(dim, out) + 2 * dim
    text = _linear(student.text_dim, dim) + _linear(dim, dim)
    return student.layers * block + _time_embedding(student) + _linear(dim, 6 * dim) + text + ends


def adapter_count(student: StudentConfig, policy: LoraConfig) -> int:
    """Parameters of one low-rank adapter: rank x (inputs + outputs) of every linear layer that it adapts."""
    feed_forward = 2 * (student.dim + student.ffn_dim) if policy.targets == "all" else 0
    return student.layers * policy.rank * (16 * student.dim + feed_forward)


def weights(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """The network, what is trained of it, and its optimiser, which works in float32."""
    count, size = trained(student, run)
    of = "the adapters" if isinstance(run.policy, LoraConfig) else "all weights"
    millions = f"{parameter_count(student) / 1e6:,.1f} M parameters, {student.dtype}"
    parts = [sharded_part("weights", weight_bytes(student), millions, load.shards)]
    if isinstance(run.policy, LoraConfig):
        parts.append(
            sharded_part("adapters", size, f"rank {run.policy.rank}: {count / 1e6:,.1f} M parameters", load.shards)
        )
    if student.dtype != "float32":
        parts.append(sharded_part("master weights", FLOAT32 * count, f"of {of}, float32", load.shards))
    gradients = sharded_part("gradients", FLOAT32 * count, f"of {of}, float32", load.shards)
    return [*parts, gradients, sharded_part("Adam", 2 * FLOAT32 * count, "two moments, float32", load.shards)]


def copies(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """The policies and networks beside the student."""
    (count, size), parts = trained(student, run), []
    if run.objective.name in MATCHING:
        fake = (3 if student.dtype == "float32" else 4) * FLOAT32 * parameter_count(student)
        parts.append(Part("scores", 2 * weight_bytes(student) + fake, "the real one; the fake one with its optimiser"))
    if isinstance(run.policy, FullConfig) and run.policy.offload:
        return parts
    parts.append(sharded_part("evaluation average", FLOAT32 * count, "float32", load.shards))
    kept = policies_of(run.objective)
    if "old" in kept:
        parts.append(sharded_part("old policy", FLOAT32 * count, "float32", load.shards))
    if "reference" in kept and isinstance(run.policy, FullConfig):
        parts.append(sharded_part("reference", size, student.dtype, load.shards))
    return parts


def clips(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """Latents, float32.

    Of a step as drawn and as remembered (for afd: and the noise they began as), noised, as targets and as the old
    policy sees them (for gan: before the last step, the gradient, and as the reference sees them); of a pass at all
    steps.
    """
    shape = load.shape
    latents = shape.frames * shape.channels * shape.height * shape.width
    copies = run.objective.noisings_per_clip if run.objective.name == "afd" else 1
    kept = 3 if run.objective.name == "afd" else 2
    count = (kept + 3 * copies) * load.step_clips + (len(student.steps) + 1) * load.clips + (1 + copies) * load.prompts
    size = FLOAT32 * (count * latents + load.prompts * student.text_tokens * student.text_dim)
    return [Part("clips", size, f"{load.step_clips} of a step, {load.clips} of a pass")]


def trained(student: StudentConfig, run: TrainConfig) -> tuple[int, int]:
    """Trained parameters, and their bytes in the network."""
    if isinstance(run.policy, LoraConfig):
        count = adapter_count(student, run.policy)
        return count, count * DTYPE_BYTES[student.dtype]
    return parameter_count(student), weight_bytes(student)


def weight_bytes(student: StudentConfig) -> int:
    """Of all weights; bfloat16 leaves norms, modulation and time embedding in float32."""
    size = DTYPE_BYTES[student.dtype]
    exact = _time_embedding(student) + (8 * student.layers + 2) * student.dim
    return parameter_count(student) * size + exact * (FLOAT32 - size)


def _time_embedding(student: StudentConfig) -> int:
    dim = student.dim
    return _linear(student.frequency_dim or dim, dim) + _linear(dim, dim)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def sharded_part(name: str, size: int, why: str, shards: int) -> Part:
    """A part that is divided by the processes."""
    return Part(name, size // shards, why if shards == 1 else f"{why}, over {shards} GPUs")
