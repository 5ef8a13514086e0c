"""What the phases of a training step add to a GPU's memory, one phase at a time.  Torch-free.

What passes through the network take was counted on the running code, tensor by tensor (in CPU's memory, with bfloat16
and float32, low ranks and none); all else follows from shapes.
"""

from __future__ import annotations

from dataclasses import replace

from afd_train.config import FullConfig, LoraConfig, Recipe, StudentConfig, TrainConfig
from afd_train.memory_discriminators import scoring
from afd_train.memory_parts import (
    DTYPE_BYTES,
    FLOAT32,
    Load,
    Part,
    parameter_count,
    sharded_part,
    trained,
    weight_bytes,
)
from afd_train.objective_config import (
    ADVERSARIAL,
    MATCHING,
    SUPERVISED,
    AfdConfig,
    DmdConfig,
    FlowMatchingConfig,
    ObjectiveConfig,
    OldPolicy,
    policies_of,
)


def phases(recipe: Recipe, run: TrainConfig, load: Load) -> dict[str, list[Part]]:
    """What each phase of a step adds, by its name."""
    student, objective = recipe.student, run.objective
    if objective.name in SUPERVISED:
        asked = {"reference": _asked(student, run, load)} if policies_of(objective) else {}
        return asked | {"update": update(student, run, load)}
    own = keys_and_values(student, load)
    # Of clips that are all drawn in one pass they stay until the update.
    kept = own if load.clips == load.step_clips else []
    other = [Part(f"{part.name} of another policy", part.bytes, "old, reference") for part in own]
    all_phases = {"drawing": [*own, *_together(student, run, load)]}
    if objective.name in MATCHING:
        all_phases |= _of_scores(student, run, load, own)
        return all_phases | {"update": [*own, *other, *update(student, run, load)]}
    all_phases["discriminator"] = [*kept, *scoring(recipe, run, load)]
    if policies_of(objective):
        all_phases["other policies"] = [*kept, *other, *_asked(student, run, load), *_together(student, run, load)]
    if isinstance(objective, OldPolicy) and (objective.sft_steps or objective.sft_weight):
        count = load.step_clips // run.rollouts_per_prompt
        all_phases["supervised"] = [*kept, *_supervised(student, run, load, min(run.clips_per_pass or count, count))]
    needed = kept if _is_forced(objective) else own
    return all_phases | {"update": [*needed, *update(student, run, load)]}


def _of_scores(student: StudentConfig, run: TrainConfig, load: Load, kept: list[Part]) -> dict[str, list[Part]]:
    """Teacher-forced updates of the fake score and, before the first step and with its own optimiser, the real one."""
    whole = run.model_copy(update={"policy": FullConfig()})  # adapters or not, all weights of a score are trained
    found = {"fake score": [*kept, *_supervised(student, whole, load, load.clips)]}
    if isinstance(run.objective, DmdConfig) and run.objective.real_steps:
        count = min(run.clips_per_pass or run.objective.real_prompts, run.objective.real_prompts)
        numbers = 3 if student.dtype == "float32" else 4
        size = numbers * FLOAT32 * parameter_count(student)
        trained_first = Part("real score's optimiser", size, "gradients and Adam, until the student moves")
        found["real score"] = [trained_first, *_supervised(student, whole, load, count)]
    return found


def _supervised(student: StudentConfig, run: TrainConfig, load: Load, clips: int) -> list[Part]:
    """A teacher-forced update on so many clips, each with a prompt of its own."""
    forced = run.model_copy(update={"objective": FlowMatchingConfig()})
    return update(student, forced, replace(load, clips=clips, prompts=clips))


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
    adapters = trained(student, run)[1] if isinstance(run.policy, LoraConfig) else 0
    return [Part("weights together", weight_bytes(student) + adapters, "not sharded while the student draws")]


def _asked(student: StudentConfig, run: TrainConfig, load: Load) -> list[Part]:
    """A pass without gradient, with another policy's weights in the place of the student's."""
    copies = run.objective.noisings_per_clip if run.objective.name == "afd" else 1
    frames = student.chunk_frames if run.chunk_by_chunk else load.shape.frames
    if run.objective.name in SUPERVISED:
        copies, frames = 2, load.shape.frames  # the clean clip beside the noisy one
    tokens = load.clips * copies * frames * load.frame_tokens
    wide = 3 if isinstance(run.policy, LoraConfig) else 2
    each = DTYPE_BYTES[student.dtype] * (11 * student.dim // 2 + wide * student.ffn_dim)
    return [
        sharded_part("weights laid aside", trained(student, run)[1], "the student's", load.shards),
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
        own = sharded_part(
            "gradients of a pass", trained(student, run)[1], f"{student.dtype}, before they are added", load.shards
        )
        parts.insert(0, own)
    return parts


def _frames(student: StudentConfig, run: TrainConfig, frames: int) -> tuple[int, int]:
    """Latent frames of a clip in one backward pass, and of the contexts that its chunks are joined with."""
    chunk, objective = student.chunk_frames, run.objective
    copies = objective.noisings_per_clip if objective.name == "afd" else 1
    reach = min(frames, student.window or frames)
    if run.chunk_by_chunk and objective.name in ADVERSARIAL:
        return copies * chunk, copies * reach if frames > chunk else 0
    joined = copies * sum(min(end, reach) for end in range(2 * chunk, frames + 1, chunk))
    return (frames if _is_forced(objective) else 0) + copies * frames, joined


def _is_forced(objective: ObjectiveConfig) -> bool:
    """Whether the clean clip passes through the network beside the noisy one."""
    return objective.name in SUPERVISED or (isinstance(objective, AfdConfig) and objective.context_gradient)


def _saved_beside(student: StudentConfig, run: TrainConfig) -> int:
    """Bytes that a block saves of a token beside 12 D + 2 F numbers in the weights' type, as counted."""
    dim, ffn, size = student.dim, student.ffn_dim, DTYPE_BYTES[student.dtype]
    if not isinstance(run.policy, LoraConfig):
        return 46 * dim
    if run.policy.targets == "all":
        return 18 * dim + size * 8 * run.policy.rank
    return max(0, 15 * dim + size * (6 * run.policy.rank - ffn))
