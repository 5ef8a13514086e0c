"""The `eval` stage: base, student and EMA against the teacher on held-out prompts -> OUT/eval.

Reads OUT/train/students/POLICY and the cache; writes videos/POLICY/KEY.mp4, metrics.parquet, results.json, report.html.
Of the teacher only the first take of each prompt is copied to videos/, so that runs can be shown beside each other.
Run again: finished videos are kept, everything else is measured anew.  The order of work is the order of `evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.files import atomic_write, one_writer
from afd_data.progress import progress_bar
from afd_train.config import EvalConfig, Recipe
from afd_train.ending import students_step
from afd_train.evaluation import clips as videos
from afd_train.evaluation import distribution, measure, provenance, quantities, relative, report
from afd_train.evaluation.clips import Clip
from afd_train.evaluation.compare import Summary, summarise, with_holm, write_rows
from afd_train.evaluation.metric import Metric
from afd_train.evaluation.showcase import gallery_rows
from afd_train.runs import eval_folder, stream_folder, student_folder, train_folder

RESULTS_VERSION = 1


def evaluate(recipe: Recipe) -> Path:
    """Generate, measure, compare, report; returns the path of report.html.

    Raises UserError when the split has no teacher videos, a student is missing, or the primary metric does not apply.
    """
    out, config = eval_folder(recipe), recipe.eval
    world = world_of(recipe)
    groups = measure.groups(world)
    primary = _metric(groups, config.primary_metric)
    cache = stream_folder(recipe)
    teacher = videos.teacher_clips(cache, config.split, config.prompts, recipe.stream.decoder)
    students = {policy: student_folder(recipe, policy) for policy in config.policies}
    checkpoints = {policy: videos.folder_sha256(folder) for policy, folder in students.items()}
    out.mkdir(parents=True, exist_ok=True)
    with one_writer(out / ".lock", str(out)):
        steps = _training_log(train_folder(recipe) / "metrics.jsonl")
        trained = students_step(train_folder(recipe))
        clips = teacher + _generated(recipe, students, teacher, trained, cache)
        videos.keep_first_takes(teacher, out / "videos" / "teacher", recipe.video)
        measured = measure.measure_clips(clips, recipe.video.fps, world)
        write_rows(out / "metrics.parquet", measured.rows)
        summary = compare(measured, groups, config, recipe.seed)
        cells = f"{len(videos.prompts_of(teacher))} x {config.clips_per_prompt}"
        header = provenance.header(recipe, checkpoints, trained, cells, videos.set_sha256(teacher))
        _write_results(out / "results.json", header, groups, summary, config.primary_metric)
        page = report.Report(
            title=f"Adversarial Flow Distillation: {recipe.out}",
            header=header,
            summary=summary,
            groups=groups,
            primary=config.primary_metric,
            gallery=gallery_rows(clips, measured.rows, primary, config, recipe.video.fps),
            steps=steps,
        )
        report.write_report(out / "report.html", page)
    return out / "report.html"


def compare(measured: measure.Measurements, groups: measure.Groups, config: EvalConfig, seed: int) -> Summary:
    """Cells and comparisons of all metrics, the distances between sets among them, Holm applied."""
    summary = summarise(measured.rows, measure.per_video(groups), config.resamples, seed)
    cells, comparisons, skipped = distribution.compare_sets(measured.features, config.resamples, seed)
    if measured.quantities:
        found = quantities.set_distances(measured.quantities, config.resamples, seed)
        cells, comparisons, skipped = cells + found[0], comparisons + found[1], skipped | found[2]
        cells += relative.cells(measured.rows, config.resamples, seed)
    return Summary(
        summary.cells + cells,
        with_holm(summary.comparisons + comparisons, config.primary_metric),
        summary.skipped | skipped,
    )


def world_of(recipe: Recipe) -> measure.World:
    """What is known of its teacher's world."""
    if recipe.teacher.name != "playground":
        return measure.World()
    return measure.World(exact=True, determined=recipe.teacher.determined)


def _generated(
    recipe: Recipe, students: Mapping[str, Path], teacher: Sequence[Clip], trained: int, cache: Path
) -> list[Clip]:
    """Videos of every student on the teacher's prompts, made where they do not exist yet; embeddings lie in `cache`."""
    config, prompts = recipe.eval, videos.prompts_of(teacher)
    found: list[Clip] = []
    for policy, folder in students.items():
        target = eval_folder(recipe) / "videos" / policy
        with progress_bar(len(prompts), "prompt", f"generate {policy}") as bar:
            made = videos.generate(
                folder,
                prompts,
                config.seed,
                config.clips_per_prompt,
                recipe.video,
                recipe.student,
                target,
                cache,
                config.clips_per_pass,
            )
            for done in made:
                bar.update(done - bar.n)
        step = 0 if policy == "base" else trained
        decoder = recipe.stream.decoder
        found += videos.generated_clips(policy, step, prompts, config.clips_per_prompt, target, decoder)
    return found


def _metric(groups: measure.Groups, name: str) -> Metric:
    known = measure.per_video(groups)
    if name not in known:
        raise UserError(
            f"eval.primary_metric: {name!r} is not measured for this teacher. Allowed here: {', '.join(known)}."
        )
    return known[name]


def _training_log(path: Path) -> list[dict[str, float]]:
    from afd_train.runlog import read_metrics

    return read_metrics(path)


def _write_results(
    path: Path,
    header: Mapping[str, Any],
    groups: measure.Groups,
    summary: Summary,
    primary: str,
) -> None:
    """results.json: everything that the report's tables say, for programs."""
    metrics = {name: asdict(metric) for group in groups.values() for name, metric in group.items()}
    record = {
        "version": RESULTS_VERSION,
        "header": header,
        "unit": "prompt",
        "primary_metric": primary,
        "metrics": metrics,
        "cells": [asdict(cell) for cell in summary.cells],
        "comparisons": [asdict(comparison) for comparison in summary.comparisons],
        "skipped": summary.skipped,
    }
    with atomic_write(path, "w") as file:
        json.dump(record, file, indent=1, allow_nan=False)
