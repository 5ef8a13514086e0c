"""A cache made by a Ray cluster: one task a partition, then the parts are merged.

`cache.engine: ray` needs the extra [ray], and the cache's folder on a file system that all nodes share; the journals
there use SQLite's rollback mode by themselves.  Every part is a cache of its own with its own journal, so a task whose
worker or node died is simply started again: it goes on with its jobs, and a paid request that was cut off between
question and answer is `unknown` there as everywhere.  Keys are read from the environment of the workers and are never
sent: workers of a cluster that this process starts inherit its environment; on a running cluster, set the variable
where `ray start` is called.  A pipeline on CUDA (`local`) gets a GPU a task; teachers behind HTTP get a quarter of a
CPU, the others a whole one.

The same without Ray, as an array of Slurm jobs, of which a killed one is queued again:

    #SBATCH --array=0-7 --cpus-per-task=2 --requeue
    afd cache-teacher recipe.yaml --partition $SLURM_ARRAY_TASK_ID/8

and when all have ended (`--dependency=afterok:JOB`), with the folder that the parts lie in:

    afd cache merge OUT/cache/parts/* -o OUT/cache
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from afd_data.cache import Summary, cache_teacher, summarise
from afd_data.config import DataConfig
from afd_data.errors import UserError
from afd_data.files import one_writer
from afd_data.journal import JOURNAL, LOCK, Journal, open_journal
from afd_data.merging import merge
from afd_data.origin import set_origin
from afd_data.partition import MERGE, Partition, check_parts, parts_of
from afd_data.progress import progress_bar
from afd_data.prompts import Prompt
from afd_data.provider_config import ProviderConfig
from afd_data.pruning import prune_held
from afd_data.sealing import Sealer
from afd_data.spool import Spool
from afd_data.states import OPEN
from afd_data.teachers import open_teacher

LOOK_S = 2.0  # between two looks at the parts' journals
DEATHS = 5  # of a task's worker or node, after which it is given up
STOP_S = 600.0  # for tasks to finish what is in flight after Ctrl-C


def cache_with_ray(
    recipe: DataConfig, prompts: list[Prompt], folder: Path, progress: bool = True, refresh: bool = False
) -> Summary:
    """`cache_teacher`, done by `cache.partitions` tasks of the Ray cluster at `cache.ray_address`.

    Raises UserError: no Ray, no cluster, whatever a part raises; KeyboardInterrupt after a clean stop on Ctrl-C.
    Whatever ends it, the same call goes on from there.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MERGE).exists():
        merge(parts_of(folder), folder, recipe.cache.near_duplicate, move=True)
    shares = [Partition(index, recipe.cache.partitions) for index in range(recipe.cache.partitions)]
    check_parts(folder, shares[0])
    if recipe.cache.storage:
        with one_writer(folder / LOCK, f"cache {folder}"):
            set_origin(folder, recipe.cache.storage)
    with _cluster(recipe.cache.ray_address) as ray:
        task = ray.remote(_cache_share).options(max_retries=DEATHS, **_needs(recipe, ray.cluster_resources()))
        shared = ray.put(prompts)
        tasks = [task.remote(recipe, shared, folder, share, refresh, os.getcwd()) for share in shares]
        _follow(ray, tasks, [share.folder(folder) for share in shares], progress)
        _raise_first([_outcome(ray, ended) for ended in tasks])
    done, wanted = _counts([share.folder(folder) for share in shares])
    if done < wanted:
        raise UserError(
            f"{wanted - done} of {wanted} videos are not finished, as the teacher could not be reached. "
            "The same command goes on from here."
        )
    merge(parts_of(folder), folder, recipe.cache.near_duplicate, move=True)
    return _summary(folder, recipe, refresh)


def _cache_share(
    recipe: DataConfig, prompts: list[Prompt], folder: Path, share: Partition, refresh: bool, start: str
) -> str:
    """Runs in a worker; returns the text of a UserError, or ""."""
    os.chdir(start)  # relative paths of a recipe start where `afd` was called
    try:
        teacher = open_teacher(share.share_of(recipe).teacher)
        cache_teacher(recipe, prompts, folder, teacher, False, refresh, share)
    except UserError as error:
        return str(error)
    return ""


def _needs(recipe: DataConfig, cluster: dict[str, float]) -> dict[str, float]:
    """What a task reserves.  Raises UserError when no node could ever give it."""
    if isinstance(recipe.teacher, ProviderConfig):
        return {"num_cpus": 0.25}
    device = recipe.teacher.device if recipe.teacher.name == "local" else "cpu"
    gpus = cluster.get("GPU", 0.0)
    if device.startswith("cuda") and gpus == 0:
        raise UserError(f"teacher.device: {device}, and the Ray cluster has no GPU. Set `auto` or `cpu`.")
    return {"num_cpus": 1, "num_gpus": 1 if device.startswith("cuda") or (device == "auto" and gpus > 0) else 0}


@contextmanager
def _cluster(address: str | None) -> Iterator[ModuleType]:
    """The module `ray`, connected: to a cluster that this process uses already, to `address`, or to a new one here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(
            "cache.engine=ray needs Ray: pip install 'adversarial-flow-distillation[ray]', or set cache.engine=threads"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cache.ray_address: no Ray cluster at {address} ({error})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _follow(ray: ModuleType, tasks: list, parts: list[Path], progress: bool) -> None:
    """Wait for all tasks; Ctrl-C has them finish what is in flight."""
    done, wanted = _counts(parts)
    try:
        with progress_bar(wanted, "video", "cache-teacher", disable=not progress, initial=done, smoothing=0.05) as bar:
            waiting = tasks
            while waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S, fetch_local=False)
                done, bar.total = _counts(parts)
                bar.update(done - bar.n)
    except KeyboardInterrupt:
        for task in tasks:
            ray.cancel(task)
        ray.wait(tasks, num_returns=len(tasks), timeout=STOP_S, fetch_local=False)
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None


def _counts(parts: list[Path]) -> tuple[int, int]:
    """(samples that came to an end, all samples) as the parts' journals tell, wherever these lie."""
    done = wanted = 0
    for part in parts:
        try:
            journal = open_journal(part)
        except UserError:  # not begun, or being made this very moment
            continue
        try:
            counts = journal.counts()
        except sqlite3.Error:  # changed while it was read
            continue
        finally:
            journal.close()
        wanted += sum(counts.values())
        done += sum(count for state, count in counts.items() if state not in OPEN)
    return done, wanted


def _outcome(ray: ModuleType, task: Any) -> str:
    """The text of a part's UserError, or "".  A bug of ours in a worker is raised as it was there."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        first = str(error).strip().partition("\n")[0]
        return (
            f"its worker died {DEATHS + 1} times, the last time of: {first} Give it more memory, or look at the node."
        )


def _raise_first(texts: list[str]) -> None:
    failed = {index: text for index, text in enumerate(texts) if text}
    if failed:
        index, text = next(iter(failed.items()))
        others = f" ({len(failed)} of {len(texts)} parts stopped)" if len(failed) > 1 else ""
        raise UserError(f"part {index} of {len(texts)}{others}: {text}\nThe same command goes on from here.")


def _summary(folder: Path, recipe: DataConfig, refresh: bool) -> Summary:
    with one_writer(folder / LOCK, f"cache {folder}"):
        journal = Journal(folder / JOURNAL, mode=recipe.cache.journal)
        try:
            sealer = Sealer(folder, journal, Spool(folder / "spool"), recipe.cache)
            sealer.recover()
            if refresh:
                prune_held(folder, recipe.refresh.keep_generations)
            return summarise(folder, journal, sealer)
        finally:
            journal.close()
