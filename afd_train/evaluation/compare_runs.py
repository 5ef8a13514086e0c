"""`afd eval --compare`: folders of evaluated runs -> one page and a table of methods.  Measures nothing anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afd_data.errors import UserError
from afd_data.sample import sample_key
from afd_data.video import read_video
from afd_train.evaluation import gallery, report
from afd_train.evaluation.method_report import write_report
from afd_train.evaluation.methods import Column, Student, Table, compare_methods
from afd_train.evaluation.runs import read_runs

RESAMPLES = 10_000
GALLERY_ROWS = 6
TAKE = 0


def compare_runs(
    folders: Sequence[Path], output: Path, baseline: str | None = None, resamples: int = RESAMPLES
) -> Table:
    """Write compare.html, compare.json and compare.md into `output`; returns what they say.

    Raises UserError where a folder holds no evaluation, the runs cannot be compared, or the baseline is unknown.
    """
    if output.is_file():
        raise UserError(f"--output {output}: is a file; the comparison needs a folder.")
    runs = read_runs(folders)
    table = compare_methods(runs, baseline, resamples)
    output.mkdir(parents=True, exist_ok=True)
    write_report(output, table, runs, gallery_rows(table))
    return table


def gallery_rows(table: Table) -> list[report.Row]:
    """Teacher, base and methods (their first seeds) side by side on evenly spaced prompts; [] without any video."""
    shown = [(column, next(iter(column.students.values()))) for column in table.columns]
    prompts = {row.prompt_id: row.prompt for rows in shown[0][1].run.rows.values() for row in rows}
    equal = {(prompt, TAKE): 0.0 for prompt in prompts}
    chosen = gallery.choose(equal, equal, "higher", GALLERY_ROWS)
    return [row for choice in chosen if (row := _row(choice, prompts[choice.prompt_id], shown, table))]


def _row(
    choice: gallery.Choice, prompt: str, shown: Sequence[tuple[Column, Student]], table: Table
) -> report.Row | None:
    clips, fps = [], 0.0
    for column, student in shown:
        path = student.run.video(student.policy, sample_key(choice.prompt_id, TAKE))
        video = read_video(path) if path.is_file() else None
        fps = video.fps if video else fps
        clips.append((column.name, video.frames if video else None))
    if not fps:
        return None
    values = [_spoken(column.name, student, choice.prompt_id, table) for column, student in shown]
    reason = f"{choice.reason}, take {TAKE}; {report.plain(table.primary)}"
    return report.Row(prompt, reason, [value for value in values if value], gallery.compose(clips, fps))


def _spoken(name: str, student: Student, prompt_id: str, table: Table) -> tuple[str, str, bool] | None:
    """(column, the primary metric's value of the clip shown, whether it failed)."""
    for row in student.run.rows.get((table.primary, student.policy), ()):
        if (row.prompt_id, row.take) == (prompt_id, TAKE):
            failed = not np.isfinite(row.value)
            return name, "failed" if failed else report.show(row.value, table.metrics[table.primary]), failed
    return None
