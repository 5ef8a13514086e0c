"""The stages as calls of the Python API, with a heading and the time each took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from afd_data.errors import UserError

from .students import resolved

NAMES = ("cache-teacher", "train", "eval", "export")


def cache_teacher(
    recipe,
    refresh: bool = False,
    watch: str | None = None,
    partition: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Ask for what is missing, seal, and print the summary; the options are those of the command."""
    from afd_data.partition import Partition

    share = None if partition is None else Partition.parse(partition)
    if share is not None and (watch is not None or push_to_hub):
        raise UserError("--partition makes one share; --watch and --push-to-hub work on the merged cache")

    def once(refresh: bool) -> None:
        folder = _cache_once(recipe, refresh, share)
        if push_to_hub:
            from afd_data.hub_push import push

            click.echo(f"Pushed to {push(folder, push_to_hub, private=private)}")

    if watch is None:
        once(refresh)
        return
    from afd_data.watching import watch as keep_refreshing

    keep_refreshing(once, watch or recipe.refresh.schedule)


def _cache_once(recipe, refresh: bool, share) -> Path:
    """One run; returns the folder of the cache."""
    from afd_data.cache import cache_teacher
    from afd_data.prompts import known_splits, load_prompts
    from afd_data.states import IN_FLIGHT
    from afd_data.status import status
    from afd_data.teachers import open_teacher
    from afd_train.runs import cache_folder

    folder = cache_folder(recipe)
    teacher = open_teacher(recipe.teacher if share is None else share.share_of(recipe).teacher)
    prompts = load_prompts(recipe.prompts, Path(), teacher, known_splits(folder))
    if recipe.cache.engine == "ray" and share is None:
        from afd_data.engine import cache_with_ray

        summary = cache_with_ray(recipe, prompts, folder, refresh=refresh)
    else:
        summary = cache_teacher(recipe, prompts, folder, teacher, refresh=refresh, partition=share)
    going_on = sum(summary.states.get(state, 0) for state in IN_FLIGHT)
    if summary.sealed == 0:
        waiting = going_on or summary.states.get("spooled")
        what = "nothing is sealed yet; the same command goes on" if waiting else "no video was taken"
        raise UserError(f"{what}.\n{status(summary.folder)}")
    click.echo(summary.text())
    if going_on:
        click.echo(f"{going_on} are still with the teacher: the same command again goes on with them")
    return folder


def train(recipe) -> None:
    """Train or go on training."""
    from afd_train.trainer import train

    train(recipe)


def evaluate(recipe) -> None:
    """Evaluate and print the result lines and the report's path."""
    from afd_train.evaluation.evaluate import evaluate

    report = evaluate(recipe)
    click.echo("\n".join(result_lines(report.parent / "results.json", recipe.eval.primary_metric)))
    click.echo(f"Report: {report}")


def compare(folders: Sequence[Path], output: Path, baseline: str | None) -> None:
    """Compare evaluated runs and print the result lines and the page's path."""
    from afd_train.evaluation.compare_runs import compare_runs
    from afd_train.evaluation.method_report import sentences

    table = compare_runs(folders, output, baseline)
    for _, sentence in sentences(table):
        click.echo(sentence)
    click.echo(f"Comparison: {output / 'compare.html'}")


def export(recipe) -> None:
    """Write the trained student in the recipe's formats."""
    from afd_train.export import export_all

    for path in export_all(recipe):
        click.echo(f"Wrote {path}")


def first_process() -> bool:
    """Whether this is the first of the processes that `accelerate launch` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run(recipe, until: str) -> None:
    """The stages up to `until`, each under a heading; `export` where the recipe names formats.

    Under `accelerate launch` all processes train, and the first does the rest.
    """
    stages: dict[str, Callable] = {"cache-teacher": cache_teacher, "train": train, "eval": evaluate, "export": export}
    names = [name for name in NAMES[: NAMES.index(until) + 1] if name != "export" or recipe.export.formats]
    if not first_process():
        if "train" in names:
            train(recipe)
        return
    for number, name in enumerate(names, start=1):
        click.secho(f"[{number}/{len(names)}] {name}", bold=True)
        start = time.monotonic()
        stages[name](recipe)
        click.echo(f"{name} took {time.monotonic() - start:.0f} s\n")


def generate(student: str, prompt: str, output: Path, seed: int, chunks: int | None, image: Path | None) -> None:
    """Write one video; `student` is a folder or a recipe's name."""
    from afd_data.prompts import normalise

    if output.suffix.lower() != ".mp4":
        raise UserError(f"--output {output}: the name must end in .mp4")
    prompt = normalise(prompt, "PROMPT")  # as training saw it: the noise is drawn from the text
    from afd_train.generate import generate

    generate(resolved(student)[0], prompt, output, seed, chunks, image)
    click.echo(f"Wrote {output}")


def result_lines(results: Path, metric: str) -> list[str]:
    """A line a comparison of one metric; the other metrics are in the report."""
    rows = json.loads(results.read_text(encoding="utf-8"))["comparisons"]
    return [_result_line(row) for row in rows if row["metric"] == metric]


def _result_line(row: dict) -> str:
    means = f"{row['a']} {row['mean_a']:.3f}, {row['b']} {row['mean_b']:.3f}"
    interval = f"{row['delta']:+.3f}" + (f" [{row['lo']:+.3f}, {row['hi']:+.3f}]" if row["lo"] is not None else "")
    return f"{row['metric']} ({row['better']} is better): {means}, difference {interval}, p {row['p']:.3g}"
