"""`afd cache`: look at a cache, settle its requests, and take it elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from afd_data.errors import UserError

from .options import recipe_options

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
PLACE = click.argument("place", metavar="PLACE")
PRIVATE = click.option("--private", is_flag=True, help="Keep the repository private.")
PLACE_HELP = "PLACE is a folder, hf://datasets/OWNER/NAME[@REVISION], or any fsspec address such as s3://BUCKET/NAME."


@click.group(short_help="Look at a cache, settle it, share it.")
def cache() -> None:
    """Work on a cache of teacher videos, DIR (OUT/cache unless the recipe says otherwise)."""


@cache.command(short_help="States, spend, pace, refusals.")
@FOLDER
def status(folder: Path) -> None:
    """How the requests stand, also while a run goes on: states, spend, rate and time left, refusals and why.

    Lists every order whose outcome is unknown, as each may be a bill; `afd cache reconcile` settles them.

    \b
      afd cache status runs/quickstart/cache
    """
    from afd_data.status import status

    click.echo(status(folder))


@cache.command(short_help="Provenance, durations, a picture.", epilog=PLACE_HELP)
@PLACE
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="contact-sheet.png",
    show_default=True,
    help="Where the picture of some clips' frames goes.",
)
def inspect(place: str, output: Path) -> None:
    """What the videos are: provenance, sizes, durations, cost, and a contact sheet to look at.

    \b
      afd cache inspect runs/quickstart/cache
      afd cache inspect hf://datasets/OWNER/NAME
    """
    from afd_data import inspection
    from afd_data.origin import local_head

    click.echo(inspection.inspect(local_head(place), output))


@cache.command(short_help="Check every hash again.", epilog=PLACE_HELP)
@PLACE
def verify(place: str) -> None:
    """Check every hash of every shard and member; exit code 2 and a list if anything is damaged.

    \b
      afd cache verify runs/quickstart/cache
      afd cache verify s3://BUCKET/NAME
    """
    from afd_data import inspection
    from afd_data.origin import local_head

    if problems := inspection.verify(local_head(place)):
        raise UserError("\n  ".join([f"{len(problems)} problems in {place}:", *problems]))
    click.echo(f"{place}: every hash is right")


@cache.command(short_help="Ask what became of unknown orders.")
@recipe_options
@click.option(
    "--grace-minutes",
    type=click.FloatRange(0),
    default=15.0,
    show_default=True,
    help="Younger orders are not called absent: a provider's list lags behind.",
)
def reconcile(recipe, grace_minutes: float) -> None:
    """Ask the provider for its list of jobs and settle the orders whose outcome is unknown.

    Found ones go on with the next `afd cache-teacher`.  Absent ones were never taken and cost nothing, and
    `afd cache resubmit --absent` orders them again.  What the provider no longer lists stays unknown.  Asks for no
    video, and costs nothing.

    \b
      afd cache reconcile seedance.yaml
    """
    from afd_data.reconcile import reconcile
    from afd_data.teachers import open_teacher
    from afd_train.runs import cache_folder

    click.echo(reconcile(cache_folder(recipe), open_teacher(recipe.teacher), 60 * grace_minutes).text())


@cache.command(short_help="Order again what ended without a video.")
@FOLDER
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--absent", is_flag=True, help="What `afd cache reconcile` found was never taken; not charged.")
@click.option(
    "--state",
    "states",
    type=click.Choice(["refused", "failed", "rejected", "unknown"]),
    multiple=True,
    help="All in this state; repeatable.",
)
@click.option("--yes", is_flag=True, help="Also what may have been charged already, and is then charged again.")
def resubmit(folder: Path, keys: tuple[str, ...], absent: bool, states: tuple[str, ...], yes: bool) -> None:
    """Plan samples again that ended without a video; the next `afd cache-teacher` asks for them.

    KEYs are those that `afd cache status` lists.  Refused, failed and rejected ones may be refused, fail or be
    rejected again; what was or may have been charged is planned with --yes only.

    \b
      afd cache resubmit OUT/cache --absent
      afd cache resubmit OUT/cache p0123456789abcdef-00 --yes
      afd cache resubmit OUT/cache --state refused
    """
    from afd_data.resubmit import resubmit

    if not (keys or absent or states):
        raise UserError("name samples, or use --absent or --state; `afd cache status` lists them")
    done = resubmit(folder, keys, states, absent, yes)
    click.echo(f"{len(done)} planned again" + ("; `afd cache-teacher` asks for them" if done else ""))


@cache.command("give-up", short_help="Wait no longer for some videos.")
@FOLDER
@click.argument("keys", metavar="KEY...", nargs=-1, required=True)
def give_up(folder: Path, keys: tuple[str, ...]) -> None:
    """Wait no longer for samples whose job is under way or unknown: nothing behind them can be sealed before.

    They are unknown from then on, no command asks about them, and their price stays reserved.  `afd cache resubmit`
    orders them again.

    \b
      afd cache give-up OUT/cache p0123456789abcdef-00
    """
    from afd_data.resubmit import give_up

    click.echo(f"{len(give_up(folder, keys))} given up")


@cache.command(short_help="Remove generations nobody reads.")
@FOLDER
@click.option("--keep", type=click.IntRange(1), default=2, show_default=True, help="Newest generations to keep.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def prune(folder: Path, keep: int, dry_run: bool) -> None:
    """Remove shards that no kept generation shows and no trainer reads.

    \b
      afd cache prune OUT/cache --keep 2 --dry-run
    """
    from afd_data.pruning import prune

    shards = prune(folder, keep, dry_run=dry_run)
    size = sum(shard.bytes for shard in shards) / 1e6
    click.echo("\n".join([f"{len(shards)} shards, {size:.1f} MB", *(f"  {shard.file}" for shard in shards)]))


@cache.command(short_help="Join caches, or parts of one.")
@click.argument("sources", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The cache that holds all; new or not."
)
@click.option(
    "--near-duplicate",
    type=click.IntRange(-1, 64),
    default=None,
    help="As cache.near_duplicate; -1: keep what shows what another prompt's video does. Default: as planned, else 0.",
)
@click.option("--storage", metavar="URL", default=None, help="Where the shards go, as cache.storage of the recipe.")
def merge(sources: tuple[Path, ...], output: Path, near_duplicate: int | None, storage: str | None) -> None:
    """Join caches into one; parts made with --partition are moved, other caches are left as they are.

    \b
      afd cache merge OUT/cache/parts/* -o OUT/cache
      afd cache merge runs/a/cache runs/b/cache -o runs/both/cache
    """
    from afd_data.files import one_writer
    from afd_data.journal import LOCK
    from afd_data.merging import merge, planned_near_duplicate
    from afd_data.origin import set_origin
    from afd_data.partition import parts_of

    parts = {path.resolve() for path in parts_of(output)}
    move = bool(parts) and parts == {path.resolve() for path in sources}
    if parts and not move:
        raise UserError(f"{output}: has parts of its own; merge all of these, and nothing else, first")
    if storage is not None:
        output.mkdir(parents=True, exist_ok=True)
        with one_writer(output / LOCK, f"cache {output}"):
            set_origin(output, storage)
    bits = planned_near_duplicate(sources) if near_duplicate is None else near_duplicate
    click.echo(merge(sources, output, bits, move=move).text())


@cache.command(short_help="Push to the Hugging Face Hub.")
@FOLDER
@click.argument("repo", metavar="OWNER/NAME")
@PRIVATE
def push(folder: Path, repo: str, private: bool) -> None:
    """Push a cache as a dataset to the Hub: only what is new there, and a tag for every generation.

    Refused where the teacher's terms disallow distillation.

    \b
      afd cache push OUT/cache me/my-teacher --private
    """
    from afd_data.hub_push import push

    click.echo(f"Pushed to {push(folder, repo, private=private)}")


@cache.command(short_help="Copy a cache to this machine.", epilog=PLACE_HELP)
@PLACE
@FOLDER
def pull(place: str, folder: Path) -> None:
    """Copy a cache from the Hub or a store, every hash checked; the same command goes on where it stopped.

    \b
      afd cache pull hf://datasets/OWNER/NAME@generation-0002 runs/pulled
    """
    from afd_data.hub_pull import pull

    manifest = pull(place, folder)
    click.echo(f"{folder}: {sum(manifest.samples().values())} samples, generation {manifest.generation}")


@cache.command(short_help="Bring an older cache up to date.")
@FOLDER
def migrate(folder: Path) -> None:
    """Bring journal and manifest of an older afd to this version; what was there is kept beside it.

    \b
      afd cache migrate OUT/cache
    """
    from afd_data.migration import migrate

    click.echo(migrate(folder))
