"""The group `afd` and its commands, in the order in which an experiment uses them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from . import stages
from .cache import cache
from .errors import MistakesGroup
from .evaluation import evaluate
from .options import RECIPE_HELP, recipe_options
from .students import export, push_student


@click.group(cls=MistakesGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Say more, and where an error was raised.")
@click.version_option(package_name="adversarial-flow-distillation", prog_name="afd")
def main(verbose: bool) -> None:
    """Distil a video model that you can only call into a student that you can stream.

    \b
    One recipe describes an experiment, and every command reads the same one:
      afd run quickstart                     all stages, some minutes on a CPU
      afd run quickstart --dry-run           what it would do
      afd cache-teacher my.yaml              ask the teacher for its videos
      afd train my.yaml --set train.steps=9  distil the student
      afd eval my.yaml                       compare base and student, write a report

    Every command can be stopped at any moment; the same command again goes on where it was.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s", force=True)
    usual = logging.INFO if stages.first_process() else logging.WARNING
    for package in ("afd", "afd_data", "afd_train"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else usual)


@main.command("cache-teacher", epilog=RECIPE_HELP, short_help="Ask the teacher for its videos.")
@recipe_options
@click.option(
    "--max-cost",
    type=click.FloatRange(0),
    default=None,
    help="Ask for nothing that could bring the spend beyond this (in the teacher's currency, all runs together), "
    "counting what is in flight or unknown; as cache.max_cost.",
)
@click.option("--refresh", is_flag=True, help="Ask anew for what the recipe's refresh section makes due.")
@click.option(
    "--watch",
    metavar="[CRON]",
    is_flag=False,
    flag_value="",
    default=None,
    help="Keep going, and refresh at these times, such as '0 3 * * 1'; without CRON those of refresh.schedule.",
)
@click.option(
    "--partition",
    metavar="I/N",
    default=None,
    help="Do share I (from 0) of N only, in CACHE/parts; then `afd cache merge`.",
)
@click.option("--push-to-hub", metavar="OWNER/NAME", default=None, help="Then push the cache to the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="With --push-to-hub: keep the repository private.")
def cache_teacher(recipe, **options) -> None:
    """Ask the teacher for every video of a recipe and seal them into shards.

    Finished videos are never asked for again: stop it and run the same command, or add prompts and run it.
    A paid video is never paid for twice: an order whose outcome cannot be known is listed as unknown, and
    `afd cache reconcile` and `afd cache resubmit` settle it.

    \b
      afd cache-teacher quickstart
      afd cache-teacher folder --set teacher.path=DIR
      afd cache-teacher seedance.yaml --dry-run              what it would ask for, and cost
      afd cache-teacher seedance.yaml --max-cost 25
      afd cache-teacher seedance.yaml --watch '0 3 * * 1'    refresh every Monday at 3
      afd cache-teacher my.yaml --partition $SLURM_ARRAY_TASK_ID/8
    """
    stages.cache_teacher(recipe, **options)


@main.command(epilog=RECIPE_HELP, short_help="Distil the student.")
@recipe_options
def train(recipe) -> None:
    """Distil the student from the cached videos of the teacher.

    Writes checkpoints, metrics.jsonl, TensorBoard files and strips of videos to OUT/train.

    \b
      afd train quickstart
      afd train quickstart --set seed=1 --set out=runs/seed1
    """
    stages.train(recipe)


@main.command(epilog=RECIPE_HELP, short_help="All stages of a recipe in order.")
@recipe_options
@click.option(
    "--until",
    type=click.Choice(stages.NAMES),
    default=stages.NAMES[-1],
    show_default=True,
    help="Stop after this stage.",
)
def run(recipe, until: str) -> None:
    """Do a recipe's stages in order: cache-teacher, train, eval, and export if the recipe has export.formats.

    \b
      afd run quickstart
      afd run my.yaml --until cache-teacher
    """
    stages.run(recipe, until)


@main.command(short_help="Write a video for a prompt.")
@click.argument("student", metavar="STUDENT")
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="out.mp4", show_default=True, help="MP4 file.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Another seed, another video."
)
@click.option("--chunks", type=click.IntRange(1), default=None, help="Length in chunks; default: as in training.")
@click.option(
    "--image",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Picture to go on from (frame-wise students).",
)
def generate(student: str, prompt: str, output: Path, seed: int, chunks: int | None, image: Path | None) -> None:
    """Write a video of PROMPT, made chunk by chunk.

    STUDENT is a student's folder, or a recipe that has been trained.

    \b
      afd generate quickstart "a red ball falls and bounces" -o ball.mp4
      afd generate runs/mine/train/students/ema "a blue ball rolls" --seed 3
    """
    stages.generate(student, prompt, output, seed, chunks, image)


main.add_command(evaluate)
main.add_command(export)
main.add_command(push_student)
main.add_command(cache)
