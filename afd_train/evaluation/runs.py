"""Folders of evaluated runs -> what they measured, grouped into methods; runs that cannot be compared are refused.

A run's name is its folder's; a trailing `-<seed>` makes it one seed of the method that the rest of the name says.
Reads what `afd eval` and `afd train` leave behind and nothing else; needs neither the cache nor the students.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd_data.errors import UserError
from afd_data.files import NO_ROOM
from afd_train.evaluation.compare import Cell, Row, read_rows
from afd_train.evaluation.metric import Metric

# Of results.json's header: what must be the same in all runs, in words.
SAME = {
    "split": "another split",
    "prompts x clips": "another number of prompts or of clips",
    "noise seed": "another seed of the evaluation (eval.seed)",
    "video": "another video format",
    "teacher's videos": "other videos of the teacher (another cache)",
}
RESERVED = ("teacher", "base")


@dataclass(frozen=True)
class Run:
    """One evaluated run.  `seed` is "" where the name ends in none; `steps` are the lines of metrics.jsonl."""

    folder: Path
    name: str
    method: str
    seed: str
    header: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    primary: str
    cells: Mapping[tuple[str, str], Cell]  # (metric, policy)
    rows: Mapping[tuple[str, str], Sequence[Row]]  # (metric, policy)
    steps: Sequence[Mapping[str, float]]

    @property
    def policies(self) -> set[str]:
        """teacher, base, student, ema: those that were measured."""
        return {policy for _, policy in self.rows}

    @property
    def policy(self) -> str:
        """The student that speaks for the run: the averaged one where it was measured."""
        return "ema" if "ema" in self.policies else "student"

    def video(self, policy: str, key: str) -> Path:
        """A generated video, or the teacher's first take; it need not be there."""
        return self.folder / "eval" / "videos" / policy / f"{key}.mp4"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, in the order given.

    Raises UserError: not evaluated, unreadable, named alike, or not comparable (other prompts, seed or teacher).
    """
    runs = [read_run(folder) for folder in folders]
    by_name: dict[str, Run] = {}
    for run in runs:
        if run.name in by_name:
            raise UserError(f"{run.folder} and {by_name[run.name].folder} have the same name. Give every run its own.")
        by_name[run.name] = run
    for run in runs[1:]:
        _check_comparable(run, runs[0])
    return runs


def read_run(folder: Path) -> Run:
    """What `afd eval` has left in OUT.  Raises UserError where it has not, or left something else."""
    name = folder.resolve().name
    method, seed = split_name(name)
    if method in RESERVED:
        raise UserError(f"{folder}: {method!r} stands for the {method} of every run here. Rename the folder.")
    results, table = folder / "eval" / "results.json", folder / "eval" / "metrics.parquet"
    for path in (results, table):
        if not path.is_file():
            raise UserError(f"{path}: not there, so {folder} is no evaluated run. Give OUT folders after `afd eval`.")
    # pyarrow's error for a damaged file is a ValueError.
    try:
        record = json.loads(results.read_text(encoding="utf-8"))
        cells = [Cell(**cell) for cell in record["cells"]]
        rows: dict[tuple[str, str], list[Row]] = {}
        for row in read_rows(table):
            rows.setdefault((row.metric, row.policy), []).append(row)
        run = Run(
            folder=folder,
            name=name,
            method=method,
            seed=seed,
            header=record["header"],
            metrics={name: Metric(**metric) for name, metric in record["metrics"].items()},
            primary=record["primary_metric"],
            cells={(cell.metric, cell.policy): cell for cell in cells},
            rows=rows,
            steps=_training_log(folder),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        raise UserError(f"{folder}/eval: not the results of an evaluation. Run `afd eval` again.") from error
    _check_complete(run)
    return run


def split_name(name: str) -> tuple[str, str]:
    """`afd-ema-3` -> (`afd-ema`, `3`); a name without a trailing number has the seed ""."""
    found = re.fullmatch(r"(.+)-(\d+)", name)
    return (found[1], found[2]) if found else (name, "")


def methods_of(runs: Sequence[Run]) -> dict[str, dict[str, Run]]:
    """Method -> seed -> run, in the order given."""
    methods: dict[str, dict[str, Run]] = {}
    for run in runs:
        others = methods.setdefault(run.method, {})
        if run.seed in others:
            raise UserError(f"{run.folder} and {others[run.seed].folder} are the same seed of {run.method}.")
        others[run.seed] = run
    return methods


def _check_complete(run: Run) -> None:
    if missing := [key for key in SAME if key not in run.header]:
        raise UserError(
            f"{run.folder}: was evaluated by a version that did not record {', '.join(missing)}. Run `afd eval` again."
        )
    if not run.policies & {"student", "ema"}:
        raise UserError(f"{run.folder}: no adapted student was measured. Add `ema` to eval.policies; run `afd eval`.")


def _check_comparable(run: Run, first: Run) -> None:
    prompts, wanted = ({row.prompt_id for rows in each.rows.values() for row in rows} for each in (run, first))
    if prompts != wanted:
        raise UserError(
            f"{run.folder}: evaluated on other prompts than {first.folder} ({len(prompts & wanted)} in common of "
            f"{len(prompts)} and {len(wanted)}). Compare runs of the same prompts."
        )
    for key, words in SAME.items():
        if run.header[key] != first.header[key]:
            raise UserError(
                f"{run.folder}: evaluated with {words} than {first.folder} ({key}: {run.header[key]} against "
                f"{first.header[key]}). Evaluate both with the same."
            )


def _training_log(folder: Path) -> list[dict[str, float]]:
    from afd_train.runlog import read_metrics

    return read_metrics(folder / "train" / "metrics.jsonl")
