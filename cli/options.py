"""RECIPE, --set and --dry-run: the same for every command that takes a recipe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import click

from afd_data.errors import UserError

RECIPE_HELP = "RECIPE is a YAML file, or the name of a recipe that afd ships, such as quickstart."


def set_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--set KEY=VALUE`, as `sets`."""
    return click.option(
        "--set",
        "sets",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change a value: --set train.steps=100, --set pretrain.0.steps=50. Repeatable; VALUE is YAML; "
        "paths are relative to this folder.",
    )(command)


def dry_run_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--dry-run`."""
    return click.option(
        "--dry-run", is_flag=True, help="Print the resolved recipe and the plan; do and write nothing."
    )(command)


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command RECIPE, --set and --dry-run; it gets the validated `recipe`, and is not called in a dry run."""

    @click.argument("recipe_name", metavar="RECIPE")
    @set_option
    @dry_run_option
    @functools.wraps(command)
    def wrapped(recipe_name: str, sets: tuple[str, ...], dry_run: bool, **others: Any) -> None:
        max_cost = others.pop("max_cost", None)  # of `cache-teacher`: a name for a value of the recipe
        if max_cost is not None:
            if not math.isfinite(max_cost):
                raise UserError(f"--max-cost {max_cost}: give an amount; leave it out for no limit")
            sets = (*sets, f"cache.max_cost={max_cost}")
        recipe = opened(recipe_name, sets, dry_run)
        if recipe is not None:
            command(recipe=recipe, **others)

    return wrapped


def opened(recipe_name: str, sets: tuple[str, ...], dry_run: bool) -> Any:
    """The validated recipe; None in a dry run, which prints it with its plan instead."""
    from afd_train.recipe import read_recipe

    loaded = read_recipe(recipe_name, sets)
    if not dry_run:
        return loaded.recipe
    from afd_train.dry_run import plan_text, recipe_text

    click.echo(recipe_text(loaded))
    click.echo(plan_text(loaded.recipe))
    return None
