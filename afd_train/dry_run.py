"""What a recipe would do: the resolved recipe as YAML, and counts, sizes and cost.  Reads, never writes; torch-free."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

from pydantic import BaseModel

from afd_data.config import VideoConfig
from afd_data.journal import Journal
from afd_data.plan import plan_samples
from afd_data.prompts import Prompt, known_splits, load_prompts
from afd_data.sample import SPLITS
from afd_data.teachers import Teacher, open_teacher
from afd_train.config import Recipe, TrainConfig
from afd_train.memory import table as memory_table
from afd_train.objective_config import ADVERSARIAL, DmdConfig, OldPolicy
from afd_train.recipe import LoadedRecipe
from afd_train.recipe_yaml import Value, child_of
from afd_train.runs import cache_folder, eval_folder, stream_source, train_folder

# Measured with afd's own encoder: a tiny clip with its JSON and tar headers, then filmed clips at crf 18 and crf 0.
_SMALLEST_SAMPLE_BYTES = 5_000
_LOSSY_BYTES_PER_PIXEL = 0.06
_LOSSLESS_BYTES_PER_PIXEL = 0.5
_PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_NOT_TEXT = re.compile(r"true|false|null|~", re.IGNORECASE)


def recipe_text(loaded: LoadedRecipe) -> str:
    """The whole recipe as YAML that `afd` reads again; a given value names its place, the others are defaults."""
    return "\n".join(_section_lines(loaded.recipe, loaded.tree, ""))


def plan_text(recipe: Recipe) -> str:
    """The plan of all stages as YAML comments, so that recipe and plan together are still a recipe.

    Raises UserError where the prompts or the teacher's folder cannot be used.
    """
    teacher = open_teacher(recipe.teacher)
    sources = (recipe.prompts.source, recipe.prompts.test_source or "")
    # Reading a Hub dataset means `datasets` and a download; a dry run does neither.
    on_hub = any(source.startswith("hf://") for source in sources)
    prompts = None if on_hub else load_prompts(recipe.prompts, Path(), teacher, known_splits(cache_folder(recipe)))
    lines = ["Plan", *_cache_lines(recipe, teacher, prompts), *_train_lines(recipe), *_eval_lines(recipe, prompts)]
    return "\n".join(f"# {line}" for line in lines)


def video_bytes(video: VideoConfig) -> int:
    """What a filmed clip takes in a shard, good to a factor of three; drawn worlds take less."""
    rate = _LOSSLESS_BYTES_PER_PIXEL if video.lossless else _LOSSY_BYTES_PER_PIXEL
    return round(_SMALLEST_SAMPLE_BYTES + rate * video.width * video.height * video.frames)


def _section_lines(section: BaseModel, given: Value | None, indent: str) -> list[str]:
    lines = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if key == "extends" and value is None:
            continue
        tree = child_of(given, key) if given else None
        place = f"  # {tree.place.label}" if tree else ""
        if isinstance(value, BaseModel):
            lines += [f"{indent}{key}:", *_section_lines(value, tree, indent + "  ")]
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            lines.append(f"{indent}{key}:")
            for index, item in enumerate(value):
                inner = _section_lines(item, child_of(tree, index) if tree else None, indent + "    ")
                lines += [f"{indent}  - {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}{place}")
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and not _NOT_TEXT.fullmatch(value):
        return value
    return json.dumps(value)


def _cache_lines(recipe: Recipe, teacher: Teacher, prompts: list[Prompt] | None) -> list[str]:
    folder = cache_folder(recipe)
    if prompts is None:
        return [
            f"cache-teacher  {recipe.teacher.name}; the prompts on the Hub are counted when they are read -> {folder}"
        ]
    splits = Counter(prompt.split for prompt in prompts)
    wanted = list(plan_samples(recipe, prompts, teacher.identity))
    there = _present(folder, {sample.fingerprint for sample in wanted})
    size = len(wanted) * video_bytes(recipe.video)
    return [
        f"cache-teacher  {recipe.teacher.name}; prompts: " + ", ".join(f"{splits[split]} {split}" for split in SPLITS),
        f"               {len(wanted)} videos, {there} of them there, {len(wanted) - there} requests to make"
        + _refusals(teacher, prompts),
        f"               up to about {_megabytes(size)} in {folder}",
        f"               cost: {_cost(recipe, teacher, len(wanted) - there)}",
    ]


def _cost(recipe: Recipe, teacher: Teacher, requests: int) -> str:
    """What is left to ask for will cost about this."""
    if not teacher.identity.paid:
        return "0 (a free teacher)"
    each, limit = teacher.estimate(recipe.video), recipe.cache.max_cost
    if each == 0:
        return "not known: set teacher.price (or the price its provider bills by) for an estimate and --max-cost"
    most = "" if limit is None else f"; stops at {limit:g} (cache.max_cost)"
    return f"about {requests * each:.2f} {teacher.identity.currency}, {each:.3g} a video{most}"


def _refusals(teacher: Teacher, prompts: list[Prompt]) -> str:
    """A teacher that brings its own prompts knows no others."""
    own = set(teacher.prompts())
    unknown = sum(prompt.text not in own for prompt in prompts) if own else 0
    return f" ({unknown} prompts have no video in the folder)" if unknown else ""


def _present(folder: Path, fingerprints: set[str]) -> int:
    path = folder / "journal.sqlite"
    if not path.is_file():
        return 0
    journal = Journal(path, writable=False)
    try:
        return sum(row.fingerprint in fingerprints for row in journal.rows(states=("spooled", "sealed")))
    finally:
        journal.close()


def _train_lines(recipe: Recipe) -> list[str]:
    runs = [*((f"pretrain.{index}", run) for index, run in enumerate(recipe.pretrain)), ("train", recipe.train)]
    lines = []
    for name, run in runs:
        lines.append(f"{'train':<14} {'' if name == 'train' else f'{name}: '}{_run_text(run)}")
        lines += [f"{'':<14} {line}" for line in _memory_lines(recipe, run, name)]
    return [*lines, f"               reads {stream_source(recipe)}, writes {train_folder(recipe)}"]


def _memory_lines(recipe: Recipe, run: TrainConfig, name: str) -> list[str]:
    """For as many processes as `accelerate launch` started, sharded where it says so."""
    # The variables that accelerate itself reads; asking accelerate would load torch.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if run.shard == "auto" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        run = run.model_copy(update={"shard": "always"})
    return memory_table(recipe, run, processes, name)


def _run_text(run: TrainConfig) -> str:
    clips = run.steps * run.prompts_per_step
    limit = f", at most {run.seconds:g} s" if run.seconds else ""
    text = f"{run.objective.name}, {run.steps} steps x {run.prompts_per_step} prompts"
    if run.objective.name in ADVERSARIAL:
        text += f" x {run.rollouts_per_prompt} rollouts"
        clips *= run.rollouts_per_prompt
    return f"{text} = {clips} clips{limit}{_before(run)}"


def _before(run: TrainConfig) -> str:
    """What the run learns of the teacher's videos before its first step."""
    objective = run.objective
    if isinstance(objective, DmdConfig) and objective.real_steps:
        return f", after {objective.real_steps} steps x {objective.real_prompts} prompts for the real score"
    if isinstance(objective, OldPolicy) and objective.sft_steps:
        return f", after {objective.sft_steps} supervised steps x {run.prompts_per_step} prompts"
    return ""


def _eval_lines(recipe: Recipe, prompts: list[Prompt] | None) -> list[str]:
    config, policies = recipe.eval, recipe.eval.policies
    writes = f"               writes {eval_folder(recipe)}"
    if prompts is None:
        return [f"eval           {config.clips_per_prompt} clips a prompt x {len(policies)} policies", writes]
    held_out = sum(prompt.split == config.split for prompt in prompts)
    count = min(config.prompts or held_out, held_out)
    if count == 0:
        return [f"eval           not possible: no {config.split} prompts; set prompts.{config.split}"]
    total = count * config.clips_per_prompt * len(policies)
    each = f"{count} {config.split} prompts x {config.clips_per_prompt} clips x {len(policies)} policies"
    return [f"eval           {each} ({', '.join(policies)}) = {total} clips", writes]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
