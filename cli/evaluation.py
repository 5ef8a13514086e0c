"""`afd eval`: of one recipe, or of runs that have been evaluated, beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from afd_data.errors import UserError

from . import stages
from .options import RECIPE_HELP, dry_run_option, opened, set_option

DEFAULT_OUTPUT = Path("comparison")


@click.command("eval", epilog=RECIPE_HELP, short_help="Compare base and student, report.")
@click.argument("given", metavar="RECIPE | RUN...", nargs=-1, required=True)
@set_option
@dry_run_option
@click.option("--compare", is_flag=True, help="Compare evaluated runs, each given by its OUT folder, not a recipe.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help=f"With --compare: folder to write to.  [default: {DEFAULT_OUTPUT}]",
)
@click.option(
    "--baseline",
    metavar="NAME",
    default=None,
    help="With --compare: the method that the others are compared with; default: base, the students before training.",
)
def evaluate(
    given: tuple[str, ...],
    sets: tuple[str, ...],
    dry_run: bool,
    compare: bool,
    output: Path | None,
    baseline: str | None,
) -> None:
    """Generate from base and student on held-out prompts, measure, and write OUT/eval/report.html.

    \b
      afd eval quickstart
      afd eval quickstart --set eval.clips_per_prompt=8

    With --compare, put evaluated runs beside each other: FOLDER/compare.html, compare.md and compare.json with a table
    of methods, differences to the baseline, validation curves and videos of the same prompts.  Nothing is generated.

    Runs whose names differ only in a trailing number are seeds of one method: runs/afd-0, runs/afd-1, runs/afd-2.
    Several seeds are judged by a paired t test over seeds (runs of one number are a pair), single runs over prompts.
    All must have been evaluated on the same prompts, with the same eval.seed and the same videos of the teacher.

    \b
      afd eval --compare runs/afd runs/sft -o comparison
      afd eval --compare runs/afd-* runs/sft-* --baseline sft
    """
    if compare:
        if sets or dry_run:
            raise UserError("--compare reads runs, not a recipe: leave out --set and --dry-run.")
        stages.compare([Path(folder) for folder in given], output or DEFAULT_OUTPUT, baseline)
        return
    if output is not None or baseline is not None:
        raise UserError("-o and --baseline belong to --compare; `afd eval RECIPE` writes to OUT/eval.")
    name, *others = given
    if others:
        raise UserError(f"{len(given)} recipes given; one at a time. To compare evaluated runs, add --compare.")
    recipe = opened(name, sets, dry_run)
    if recipe is not None:
        stages.evaluate(recipe)
