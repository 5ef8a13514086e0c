"""Runs that an alarm ended well (train.on_alarm best), and their TRAIN/diagnosis.json.  Torch-free."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError
from afd_data.files import atomic_write

if TYPE_CHECKING:
    from afd_train.alarms import Diagnosis
    from afd_train.best import Best
    from afd_train.exported import Students
    from afd_train.parallel import Processes

log = logging.getLogger(__name__)

DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class Ending:
    """What went wrong, after which step, and which step's students were left.

    best_step: steps done; None where validation measured nothing, and the students are those of the last checkpoint.
    """

    name: str
    step: int
    message: str
    best_step: int | None

    @property
    def students(self) -> str:
        """Where the students that were left come from, for people."""
        return "the last checkpoint" if self.best_step is None else f"the best validation, after {self.best_step} steps"


def end_with_best(folder: Path, found: Diagnosis, best: Best, students: Students, processes: Processes) -> None:
    """Leave the best students; with diagnosis.json, the last to be written, the run in `folder` counts as finished.

    Checkpoints stay as they are.
    """
    ending = Ending(found.name, found.step, found.message, best.step)
    if best.step is not None:
        for name in ("student", "ema", "best"):
            students.write(name, "best")
    if processes.main:
        with atomic_write(folder / DIAGNOSIS, "w") as file:
            json.dump(asdict(ending), file, indent=1)
        log.warning(f"{found.name}: {found.message} The students are those of {ending.students}.")
    processes.wait()


def ended(folder: Path, begun: bool) -> bool:
    """Whether an alarm ended the run in `folder`, which is then said.

    begun: it has a checkpoint.  Without one it starts anew, and its ending is forgotten.
    """
    if not begun:
        (folder / DIAGNOSIS).unlink(missing_ok=True)
        return False
    ending = read_ending(folder)
    if ending is not None:
        log.info(
            f"{folder}: ended at step {ending.step} by an alarm, {ending.name}; its students are those of "
            f"{ending.students}. Remove {DIAGNOSIS} there to go on from the last checkpoint."
        )
    return ending is not None


def students_step(folder: Path) -> int:
    """Steps of the students in TRAIN/students: the newest checkpoint's, or the best's where an alarm ended the run.

    0 where there is neither.
    """
    from afd_train.checkpoint import latest_checkpoint, step_of

    ending = read_ending(folder)
    if ending is not None and ending.best_step is not None:
        return ending.best_step
    newest = latest_checkpoint(folder / "checkpoints")
    return step_of(newest) if newest else 0


def read_ending(folder: Path) -> Ending | None:
    """None for a run that its alarms have not ended.  Raises UserError for a file that afd did not write."""
    path = folder / DIAGNOSIS
    try:
        return Ending(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not what afd wrote ({error}). Remove it; training then goes on.") from None
