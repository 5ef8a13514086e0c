"""Whether a training run fits a GPU's memory, and what to change where it does not: for `--dry-run`.  Torch-free.

A GB of `train.gpu_memory_gb` is what is written on a card: 2^30 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from afd_train import memory_discriminators, memory_parts, memory_phases
from afd_train.config import FullConfig, LoraConfig, Recipe, TrainConfig
from afd_train.memory_parts import Load, Part
from afd_train.objective_config import ADVERSARIAL

GIB = 2**30
CUDA_BYTES = GIB  # an allowance, not a sum
WORTH_BYTES = GIB // 10  # a change that saves less is not advised
SMALL_BYTES = GIB  # below it a sum is all that a dry run prints
RANKS = (128, 64, 32)
PROCESSES = (2, 4, 8, 16, 32, 64)


def estimate(recipe: Recipe, run: TrainConfig, processes: int = 1) -> list[Part]:
    """The parts of a GPU's memory in the fullest phase of a step of `run`: `recipe.train`, or one of `recipe.pretrain`.

    Weights and optimiser are divided by `processes` only where `run.shard` is `always`: `auto` is for the caller to
    resolve, who can see how the program was launched.  Offloaded copies, being elsewhere, are left out.
    """
    load = Load.of(recipe, run, processes)
    parts = [
        *memory_parts.weights(recipe.student, run, load),
        *memory_parts.copies(recipe.student, run, load),
        *memory_parts.clips(recipe.student, run, load),
        *memory_discriminators.discriminator(recipe, run, load),
        *max(memory_phases.phases(recipe, run, load).values(), key=total),
    ]
    if run.gpu_memory_gb is not None:
        parts.append(Part("CUDA", CUDA_BYTES, "context, workspaces, the allocator's gaps: an allowance"))
    return parts


def total(parts: Iterable[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


def missing(parts: Iterable[Part], run: TrainConfig) -> int:
    """Bytes by which the parts exceed `run.gpu_memory_gb`; what is left is negative.  0 where that is not given."""
    return 0 if run.gpu_memory_gb is None else total(parts) - int(run.gpu_memory_gb * GIB)


@dataclass(frozen=True)
class _Change:
    """Settings of a run, in alternatives of which the first that is enough is taken, and what they cost."""

    alternatives: list[dict[str, Any]]
    cost: str
    processes: tuple[int, ...] = ()  # as many as there are alternatives; none: as they are


def advice(
    parts: list[Part], recipe: Recipe, run: TrainConfig, processes: int = 1, section: str = "train"
) -> list[str]:
    """What to change, all of it together, so that `run` fits: least harm first, with what each saves; [] if it fits.

    parts: what `estimate` says of the same arguments; section: where the recipe has `run`, such as `pretrain.0`.  Lines
    name settings as `--set KEY=VALUE`.
    """
    lines: list[str] = []
    for change in _changes(run, Load.of(recipe, run, processes).clips, processes):
        if missing(parts, run) <= 0:
            break
        counts = change.processes or (processes,) * len(change.alternatives)
        outcomes = [_outcome(recipe, run, *choice) for choice in zip(change.alternatives, counts, strict=True)]
        fitting = [outcome for outcome in outcomes if missing(outcome.parts, run) <= 0]
        best = (fitting or outcomes[-1:])[0] if outcomes else None
        if best is None or total(parts) - total(best.parts) < WORTH_BYTES:
            continue
        saved = (total(parts) - total(best.parts)) / GIB
        launch = f"accelerate launch --num_processes {best.processes} with " if change.processes else ""
        lines.append(f"{launch}{_sets(section, best.settings)} saves {saved:.1f} GiB: {change.cost}")
        run, parts, processes = best.run, best.parts, best.processes
    if (lacking := missing(parts, run)) > 0:
        lines.append(f"still {lacking / GIB:.1f} GiB too much: a smaller student, smaller or shorter videos")
    return lines


@dataclass(frozen=True)
class _Outcome:
    settings: dict[str, Any]
    run: TrainConfig
    parts: list[Part]
    processes: int


def _outcome(recipe: Recipe, run: TrainConfig, settings: dict[str, Any], processes: int) -> _Outcome:
    changed = run
    for key, value in settings.items():
        changed = _with(changed, key, value)
    return _Outcome(settings, changed, estimate(recipe, changed, processes), processes)


def _changes(run: TrainConfig, clips: int, processes: int) -> Iterator[_Change]:
    """All changes that mean something for `run`, least harm first."""
    halves = [clips >> power for power in range(1, clips.bit_length())]
    yield _Change([{"clips_per_pass": count} for count in halves], "the same gradient, in more and smaller passes")
    forced = run.objective.name == "afd" and run.objective.context_gradient
    if run.objective.name in ADVERSARIAL and not forced and not run.chunk_by_chunk:
        yield _Change([{"chunk_by_chunk": True}], "the same gradient, one backward pass a chunk")
    if not run.gradient_checkpointing:
        yield _Change([{"gradient_checkpointing": True}], "the same gradient; the update takes about a third longer")
    if isinstance(run.policy, FullConfig) and not run.policy.offload:
        yield _Change([{"policy.offload": True}], "the same numbers; copies travel to the GPU and back every step")
    if forced:
        detached = {"objective.context_gradient": False, "chunk_by_chunk": True}
        yield _Change([detached], "another, smaller gradient: none through the clean context")
    rank = run.policy.rank if isinstance(run.policy, LoraConfig) else LoraConfig().rank
    if isinstance(run.policy, FullConfig):
        yield _Change([{"policy.name": "lora"}], f"adapters of rank {rank} are trained instead of all weights")
    smaller = [{"policy.rank": choice} for choice in RANKS if choice < rank]
    yield _Change(smaller, "fewer directions that the student can move in")
    counts = tuple(n for n in PROCESSES if n >= processes and run.prompts_per_step % n == 0)
    yield _Change([{"shard": "always"}] * len(counts), "more GPUs", counts)


def _with(run: TrainConfig, key: str, value: Any) -> TrainConfig:
    """`run` with one setting changed, named as below `train` in a recipe."""
    section, _, name = key.rpartition(".")
    if key == "policy.name":
        return run.model_copy(update={"policy": LoraConfig()})
    if section:
        value = getattr(run, section).model_copy(update={name: value})
    return run.model_copy(update={section or name: value})


def _sets(section: str, settings: dict[str, Any]) -> str:
    return " ".join(f"--set {section}.{key}={json.dumps(value).strip(chr(34))}" for key, value in settings.items())


def table(recipe: Recipe, run: TrainConfig, processes: int = 1, section: str = "train") -> list[str]:
    """The estimate as lines of text, its sum against the GPU's memory, and advice; one line where it is small."""
    parts = estimate(recipe, run, processes)
    if run.gpu_memory_gb is None and total(parts) < SMALL_BYTES:
        return [f"memory about {total(parts) / GIB:.1f} GiB"]
    lines = [f"{part.bytes / GIB:8.2f} GiB  {part.name}: {part.why}" for part in parts if part.bytes >= GIB / 200]
    load = Load.of(recipe, run, processes)
    added = memory_phases.phases(recipe, run, load)
    phases = ", ".join(f"{name} {total(phase) / GIB:.1f}" for name, phase in added.items())
    lines += [
        f"{total(parts) / GIB:8.2f} GiB  {_verdict(parts, run)}",
        f"(GiB that the phases of a step add: {phases})",
        *memory_discriminators.seconds(recipe, run, load),
    ]
    heading = f"memory of {'the GPU' if processes == 1 else f'each of {processes} GPUs'}, by arithmetic:"
    return [heading, *lines, *advice(parts, recipe, run, processes, section)]


def _verdict(parts: list[Part], run: TrainConfig) -> str:
    if run.gpu_memory_gb is None:
        return "together; train.gpu_memory_gb is not given"
    left = -missing(parts, run) / GIB
    outcome = f"fits, {left:.1f} GiB are left" if left >= 0 else f"does not fit, {-left:.1f} GiB are missing; try"
    return f"together; of {run.gpu_memory_gb:g} GB: {outcome}"
