"""What a run says about itself: progress bar, metrics.jsonl, timings.jsonl, and trackers through accelerate.

`metrics.jsonl` holds one JSON object a step and only what follows from the seed, so that a resumed run's file equals
an unbroken one's byte for byte; what a clock said stands in `timings.jsonl`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from afd_data.progress import progress_bar


class Stopwatch:
    """Seconds by part of a step."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds since the last call, by part."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{part}": round(value, 4) for part, value in seconds.items()}


def clock_of(which: Literal["wall", "cpu"]) -> Callable[[], float]:
    """Seconds since some moment: of the wall clock, or of this process's threads on all CPUs."""
    return time.process_time if which == "cpu" else time.perf_counter


class RunLog:
    """Writes the log of a run on the main process."""

    def __init__(self, folder: Path, accelerator: Accelerator, resume_from: int | None, steps: int):
        """`resume_from`: drop lines of this step and later, which a killed run wrote after its last checkpoint."""
        self._accelerator = accelerator
        self._warming = False
        self._main = accelerator.is_main_process
        self._metrics, self._timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        if self._main:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self._metrics, self._timings):
                _truncate(path, resume_from)
        done = 0 if resume_from is None else resume_from
        self._bar = progress_bar(steps, "step", "train", initial=done, disable=not self._main)

    def write(self, step: int, metrics: dict[str, float], timings: dict[str, float]) -> None:
        """One line a file, the trackers' scalars, and the bar."""
        if self._main:
            _append(self._metrics, {"step": step, **metrics})
            _append(self._timings, {"step": step, **timings})
        self._accelerator.log({**metrics, **timings}, step=max(step, 0))
        if step < 0:
            self._bar.set_description(f"warm-up {-step}", refresh=False)
        elif self._warming:  # the rate and ETA of the steps to come do not count the warm-up, which may end early
            self._bar.set_description("train", refresh=False)
            self._bar.reset()
        if step >= 0:
            self._bar.update()
        self._warming = step < 0
        shown = {"loss": "student/loss", "margin": "discriminator/margin", "ref": "student/reference_distance"}
        values = {name: f"{metrics[key]:.3f}" for name, key in shown.items() if key in metrics}
        self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        """Flush the bar and the trackers."""
        self._bar.close()
        for tracker in self._accelerator.trackers:  # `end_training` would end the processes' group too
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a log; a last line that a killed process left half is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        rows.append(json.loads(line))
    return rows


def _truncate(path: Path, step: int | None) -> None:
    """Cut the log off before `step`; what stays is not written anew, so that a kill in between cannot lose it."""
    kept = 0
    if step is not None and path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                break
            kept += len(line)
    with path.open("ab") as file:
        file.truncate(kept)


def _append(path: Path, row: dict[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
