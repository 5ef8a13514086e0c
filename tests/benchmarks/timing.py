"""Seconds and memory of alternatives on a machine that others use too.

Alternatives take turns, so that a busy minute falls on all of them; ratios are medians over rounds of the ratio within
a round.  With one thread on a CPU, seconds are those of this process: what other programs take does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Found:
    """Of one alternative: seconds in every round, and the most bytes that a GPU held (None on a CPU)."""

    seconds: list[float]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: Found) -> float:
        """How many times as long as another alternative this one takes."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(work: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Found]:
    """Every alternative once to warm up, then `repeats` rounds of all of them, each round from another one on."""
    found = {name: Found([], None) for name in work}
    for part in work.values():
        part()
    names = [*work]
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            found[name].seconds.append(seconds(work[name], device))
            if device.type == "cuda":
                found[name].peak_bytes = torch.cuda.max_memory_allocated(device)
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronise(device)
    start = clock()
    work()
    synchronise(device)
    return clock() - start


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: torch.device, side: int = 4096, repeats: int = 3) -> float:
    """FLOP/s of the fastest of a few products of square matrices: what the arithmetic floor divides by."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(repeats + 1))


def machine(device: torch.device) -> str:
    """torch, threads and device in words."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {what}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def gib(peak_bytes: int | None) -> str:
    """A cell: GiB, or nothing."""
    return "" if peak_bytes is None else f"{peak_bytes / 2**30:.2f}"


def device_options(parser: argparse.ArgumentParser) -> None:
    """Those of every benchmark: --device, --repeats and --json."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="rounds; default: by size")
    parser.add_argument("--json", help="write the numbers to this file as well")


def write_json(path: str | None, record: object) -> None:
    """To a file where one was asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(record, indent=1))
