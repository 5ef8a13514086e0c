"""The parts of a GPU's memory in a training run, from arithmetic on a recipe.  Torch-free.

What always is there (`weights`, `copies`, `clips`, `discriminator`), and what the phases of a step add to it, one
phase at a time (`phases`).  What a pass takes of the memory was counted on the running code, tensor by tensor; all else
follows from shapes.  The autoencoder and the text encoder are not in memory while a student trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd_train.config import AfdConfig, FullConfig, LatentShape, LoraConfig, Recipe, StudentConfig, TrainConfig

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
        """The largest share of a step that one of `processes` has."""
        group = run.rollouts_per_prompt if run.objective.name == "afd" else 1
        prompts = math.ceil(run.prompts_per_step / processes)
        clips = min(run.clips_per_pass or prompts * group, prompts * group)
        shape = recipe.student.latent_shape(recipe.video)
        return Load(
            step_clips=prompts * group,
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
    count, size = _trained(student, run)
    of = "the adapters" if isinstance(run.policy, LoraConfig) else "all weights"
    millions = f"{parameter_count(student) / 1e6:,.1f} M parameters, {student.dtype}"
    parts = [_part("weights", _weight_bytes(student), millions, load.shards)]
    if isinstance(run.policy, LoraConfig):
        parts.append(_part("adapters", size, f"rank {run.policy.rank}: {count / 1e6:,.1f} M parameters", load.shards))
    if student.dtype != "float32":
        parts.append(_part("master weights", FLOAT32 * count, f"of {of}, float32", load.shards))
    gradients = _part("gradients", FLOAT32 * count, f"of {of}, float32", load.shards)
    return [*parts, gradients, _part("Adam", 2 * FLOAT32 * count, "two moments, float32", load.shards)]


def copies(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """The policies and networks beside the student."""
    (count, size), parts = _trained(student, run), []
    if run.objective.name == "distil":
        fake = (3 if student.dtype == "float32" else 4) * FLOAT32 * parameter_count(student)
        parts.append(Part("scores", 2 * _weight_bytes(student) + fake, "the real one; the fake one with its optimiser"))
    if isinstance(run.policy, FullConfig) and run.policy.offload:
        return parts
    parts.append(_part("evaluation average", FLOAT32 * count, "float32", load.shards))
    if run.objective.name == "afd":
        parts.append(_part("old policy", FLOAT32 * count, "float32", load.shards))
        if isinstance(run.policy, FullConfig):
            parts.append(_part("reference", size, student.dtype, load.shards))
    return parts


def clips(student: StudentConfig, load: Load) -> list[Part]:
    """Latents, float32: of a step as drawn and as remembered, of a pass at all steps, noised, and as targets."""
    shape = load.shape
    latents = shape.frames * shape.channels * shape.height * shape.width
    count = 2 * load.step_clips + (len(student.steps) + 4) * load.clips + load.prompts
    size = FLOAT32 * (count * latents + load.prompts * student.text_tokens * student.text_dim)
    return [Part("clips", size, f"{load.step_clips} of a step, {load.clips} of a pass")]


def discriminator(recipe: Recipe, run: TrainConfig, load: Load) -> list[Part]:
    """Its weights, gradients and optimiser."""
    if run.objective.name != "afd":
        return []
    config, shape, dim = recipe.discriminator, load.shape, recipe.discriminator.dim
    patch = shape.channels * config.patch**2 * config.tubelet_frames
    places = shape.frames // config.tubelet_frames + (shape.height // config.patch) * (shape.width // config.patch)
    ends = _linear(patch, dim) + _linear(recipe.student.text_dim, dim) + (places + 1) * dim + 3 * dim + 1
    count = ends + config.layers * (12 * dim**2 + 13 * dim)
    return [Part("discriminator", 4 * FLOAT32 * count, f"{count / 1e6:,.1f} M parameters with gradients and Adam")]


def phases(recipe: Recipe, run: TrainConfig, load: Load) -> dict[str, list[Part]]:
    """What each phase of a step adds, by its name."""
    student, objective = recipe.student, run.objective
    if objective.name == "flow-matching":
        return {"update": update(student, run, load)}
    own = keys_and_values(student, load)
    # Of clips that are all drawn in one pass they stay until the update.
    kept = own if load.clips == load.step_clips else []
    other = [Part(f"{part.name} of another policy", part.bytes, "old, reference") for part in own]
    all_phases = {"drawing": [*own, *_together(student, run, load)]}
    if not isinstance(objective, AfdConfig):
        return all_phases | {"update": [*own, *other, *update(student, run, load)]}
    all_phases["discriminator"] = [*kept, *scoring(recipe, run, load)]
    all_phases["old policy"] = [*kept, *other, *_asked(student, run, load), *_together(student, run, load)]
    needed = kept if objective.context_gradient else own
    return all_phases | {"update": [*needed, *update(student, run, load)]}


def keys_and_values(student: StudentConfig, load: Load) -> list[Part]:
    """The cache of clean chunks and of texts."""
    token = 2 * student.layers * student.dim * DTYPE_BYTES[student.dtype]
    frames, text = load.shape.frames * load.frame_tokens, student.text_tokens
    return [
        Part("keys and values", load.clips * frames * token, f"{load.clips} clips x {load.shape.frames} latent frames"),
        Part("text's", load.prompts * text * token, f"{load.prompts} prompts x {text} tokens"),
    ]


def _together(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """Sharded weights are put together for many small passes."""
    if load.shards == 1:
        return []
    adapters = _trained(student, run)[1] if isinstance(run.policy, LoraConfig) else 0
    return [Part("weights together", _weight_bytes(student) + adapters, "not sharded while the student draws")]


def _asked(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """A pass without gradient over whole clips, with another policy's weights in the place of the student's."""
    copies = run.objective.noisings_per_clip if run.objective.name == "afd" else 1
    tokens = load.clips * copies * load.shape.frames * load.frame_tokens
    wide = 3 if isinstance(run.policy, LoraConfig) else 2
    each = DTYPE_BYTES[student.dtype] * (11 * student.dim // 2 + wide * student.ffn_dim)
    return [
        _part("weights laid aside", _trained(student, run)[1], "the student's", load.shards),
        Part("a pass without gradient", tokens * each, f"{tokens:,} tokens"),
    ]


def update(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """What the student's update saves for its backward pass.

    Of a token a block saves at least 12 D + 2 F numbers in the weights' type; D and F: width, of the feed-forward.
    """
    dim, ffn, size = student.dim, student.ffn_dim, DTYPE_BYTES[student.dtype]
    frames, seen = _frames(student, run, load.shape.frames)
    tokens = load.clips * frames * load.frame_tokens
    live = 1 if run.gradient_checkpointing else student.layers
    blocks = "1 block" if live == 1 else f"{live} blocks"
    context = live * 2 * dim * size * load.clips * seen * load.frame_tokens
    beside = tokens * (live * _saved_beside(student, run) + 14 * dim + size * ffn)
    parts = [
        Part("activations", live * tokens * (12 * dim + 2 * ffn) * size, f"{blocks}, {tokens:,} tokens"),
        Part("beside them", beside, "float32 of norms, low ranks, gradients passing through a block"),
        Part("contexts", context, f"{blocks}: cached keys and values joined with a chunk's own"),
    ]
    if run.gradient_checkpointing:
        inputs = student.layers * tokens * dim * size
        parts.insert(0, Part("block inputs", inputs, f"gradient checkpointing, {tokens:,} tokens"))
    if student.dtype != "float32":
        own = _part(
            "gradients of a pass", _trained(student, run)[1], f"{student.dtype}, before they are added", load.shards
        )
        parts.insert(0, own)
    return parts


def scoring(recipe: Recipe, run: TrainConfig, load: Load) -> list[Part]:
    """What the discriminator's update saves: 16 widths a token and layer, float32."""
    if run.objective.name != "afd":
        return []
    config, shape = recipe.discriminator, load.shape
    grid = (shape.height // config.patch) * (shape.width // config.patch)
    tokens = grid * (shape.frames // config.tubelet_frames) + recipe.student.text_tokens + 1
    most = run.clips_per_pass or config.warmup_prompts
    warmup = 2 * min(most, config.warmup_prompts) if config.warmup_steps else 0
    count = max(load.clips + load.prompts, warmup)
    size = count * tokens * config.layers * 16 * config.dim * FLOAT32
    return [Part("its activations", size, f"of the discriminator, {count} clips x {tokens:,} tokens")]


def _frames(student: StudentConfig, run: TrainConfig, frames: int) -> tuple[int, int]:
    """Latent frames of a clip in one backward pass, and of the contexts that its chunks are joined with."""
    chunk, objective = student.chunk_frames, run.objective
    copies = objective.noisings_per_clip if objective.name == "afd" else 1
    reach = min(frames, student.window or frames)
    if run.chunk_by_chunk and objective.name == "afd":
        return copies * chunk, copies * reach if frames > chunk else 0
    joined = copies * sum(min(end, reach) for end in range(2 * chunk, frames + 1, chunk))
    forced = objective.name == "flow-matching" or (objective.name == "afd" and objective.context_gradient)
    return (frames if forced else 0) + copies * frames, joined


def _saved_beside(student: StudentConfig, run: TrainConfig) -> int:
    """Bytes that a block saves of a token beside 12 D + 2 F numbers in the weights' type, as counted."""
    dim, ffn, size = student.dim, student.ffn_dim, DTYPE_BYTES[student.dtype]
    if not isinstance(run.policy, LoraConfig):
        return 46 * dim
    if run.policy.targets == "all":
        return 18 * dim + size * 8 * run.policy.rank
    return max(0, 15 * dim + size * (6 * run.policy.rank - ffn))


def _trained(student: StudentConfig, run: TrainConfig) -> tuple[int, int]:
    """Trained parameters, and their bytes in the network."""
    if isinstance(run.policy, LoraConfig):
        count = adapter_count(student, run.policy)
        return count, count * DTYPE_BYTES[student.dtype]
    return parameter_count(student), _weight_bytes(student)


def _weight_bytes(student: StudentConfig) -> int:
    """Of all weights; bfloat16 leaves norms, modulation and time embedding in float32."""
    size = DTYPE_BYTES[student.dtype]
    exact = _time_embedding(student) + (8 * student.layers + 2) * student.dim
    return parameter_count(student) * size + exact * (FLOAT32 - size)


def _time_embedding(student: StudentConfig) -> int:
    dim = student.dim
    return _linear(student.frequency_dim or dim, dim) + _linear(dim, dim)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _part(name: str, size: int, why: str, shards: int) -> Part:
    return Part(name, size // shards, why if shards == 1 else f"{why}, over {shards} GPUs")
