"""The stages as calls of the Python API, with a heading and the time each took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import click

from afd_data.errors import UserError

from .students import resolved

NAMES = ("cache-teacher", "train", "eval", "export")


def cache_teacher(recipe) -> None:
    """Ask for what is missing, seal, and print the summary."""
    from afd_data.cache import cache_teacher
    from afd_data.inspection import status
    from afd_data.prompts import load_prompts
    from afd_data.teachers import open_teacher
    from afd_train.runs import cache_folder

    teacher = open_teacher(recipe.teacher)
    prompts = load_prompts(recipe.prompts, Path(), teacher)
    summary = cache_teacher(recipe, prompts, cache_folder(recipe), teacher)
    if summary.sealed == 0:
        raise UserError(f"no video was taken.\n{status(summary.folder)}")
    click.echo(summary.text())


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
