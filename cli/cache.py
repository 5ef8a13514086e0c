"""`afd cache`: look at a cache without changing it."""

from __future__ import annotations

from pathlib import Path

import click

from afd_data.errors import UserError

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(short_help="Look at a cache: status, inspect, verify.")
def cache() -> None:
    """Look at a cache of teacher videos, DIR (OUT/cache unless the recipe says otherwise)."""


@cache.command(short_help="States of the requests, counts.")
@FOLDER
def status(folder: Path) -> None:
    """How the requests stand: asked, finished, refused, rejected and why.

    \b
      afd cache status runs/quickstart/cache
    """
    from afd_data import inspection

    click.echo(inspection.status(folder))


@cache.command(short_help="Provenance, durations, a picture.")
@FOLDER
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="contact-sheet.png",
    show_default=True,
    help="Where the picture of some clips' frames goes.",
)
def inspect(folder: Path, output: Path) -> None:
    """What the videos are: provenance, sizes, durations, and a contact sheet to look at.

    \b
      afd cache inspect runs/quickstart/cache
    """
    from afd_data import inspection

    click.echo(inspection.inspect(folder, output))


@cache.command(short_help="Check every hash again.")
@FOLDER
def verify(folder: Path) -> None:
    """Check every hash of every shard and member; exit code 2 and a list if anything is damaged.

    \b
      afd cache verify runs/quickstart/cache
    """
    from afd_data import inspection

    if problems := inspection.verify(folder):
        raise UserError("\n  ".join([f"{len(problems)} problems in {folder}:", *problems]))
    click.echo(f"{folder}: every hash is right")
