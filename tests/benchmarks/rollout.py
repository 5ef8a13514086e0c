"""A rollout against a plain loop on the same weights and against the arithmetic floor; and longer and longer ones.

    python -m tests.benchmarks.rollout [--size tiny|few-layers|1.3B] [--device cpu|cuda] [--repeats N] [--json FILE]
    python -m tests.benchmarks.rollout --window

Before anything is timed, all alternatives must draw the same clips.  Prints markdown; ratios matter, seconds depend on
the machine.  Never fails on a number.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from afd_train.flow import clean_from_velocity, noised
from afd_train.rollout import Noise, rollout, rollout_chunks
from afd_train.students import DTYPES
from afd_train.students.causal_wan import CausalWan
from afd_train.students.spans import EVERYTHING, Window
from tests.benchmarks.plain_loop import PlainLoop
from tests.benchmarks.sizes import NAMES, Size, rollout_flops, size_of
from tests.benchmarks.timing import (
    device_options,
    gib,
    interleaved,
    machine,
    markdown,
    matmul_rate,
    seconds,
    synchronise,
    write_json,
)

REPEATS = {"tiny": 40, "few-layers": 5, "1.3B": 3}
LENGTHS = 7, 14, 28  # chunks
WINDOW_CHUNKS = 3
EXACT, ROUNDED = 1e-5, 0.05  # largest error in float32; error in bfloat16 relative to the clips


class Bench:
    """A student of some size, and the ways to draw with it."""

    def __init__(self, size: Size, device: torch.device):
        self.size, self.device = size, device
        self.net, self.text = size.net(device), size.text(device)
        self.chunks = size.shape.frames // self.net.chunk_frames
        self._loop = PlainLoop(self.net, size.clips, size.shape)

    def cached(self) -> Tensor:
        """As training and evaluation draw."""
        return rollout(self.net, self.text, self.noise(), self.size.sampler, self.chunks).clips

    def plain(self) -> Tensor:
        """The loop of the released students."""
        return self._loop.rollout(self.text, self.noise(), self.size.sampler, self.chunks)

    @torch.no_grad()
    def uncached(self) -> Tensor:
        """Every step runs over all chunks before it again."""
        net, noise, sampler, done = self.net, self.noise(), self.size.sampler, []
        for index in range(self.chunks):
            times = sampler.times if index else sampler.first_times
            x = clean = noise.step()
            before = torch.zeros(len(x), index * net.chunk_frames, device=self.device)
            for now, after in zip(times, [*times[1:], None], strict=True):
                t = torch.full(x.shape[:2], now, device=self.device)
                v = net(torch.cat([*done, x], 1), torch.cat([before, t], 1), self.text)[:, -net.chunk_frames :]
                clean = clean_from_velocity(x, v, t)
                if after is not None:
                    x = noised(clean, noise.step(), torch.full_like(t, after))
            done.append(clean)
        return torch.cat(done, 1)

    def noise(self) -> Noise:
        """The same for all of them."""
        return self.size.noise(self.device)

    def check(self) -> float:
        """The largest distance between the clips they draw.  Raises AssertionError if these are not the same."""
        expected, worst = self.plain(), 0.0
        for found in (self.cached(), self.uncached()):
            worst = max(worst, float((found - expected).abs().max()))
            relative = float((found - expected).norm() / expected.norm())
            exact = self.size.student.dtype == "float32"
            assert worst <= EXACT if exact else relative <= ROUNDED, f"clips differ by {worst:.1e}, {relative:.1e}"
        return worst

    def parts(self) -> dict[str, float]:
        """Seconds of a cached rollout's parts."""
        clock = Clock(self.net, self.noise(), self.device)
        both = cast(Any, clock)
        whole = seconds(lambda: rollout(both, self.text, both, self.size.sampler, self.chunks), self.device)
        return clock.spent | {"the rest": whole - sum(clock.spent.values())}


@dataclass
class Clock:
    """In the place of a rollout's network and of its noise: hands them on and adds up what they take."""

    net: CausalWan
    noise: Noise
    device: torch.device
    spent: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self.chunk_frames, self.memory = self.net.chunk_frames, self.net.memory
        self.chunk = self._timed("denoising passes", self.net.chunk)
        self.remember = self._timed("cache passes", self.net.remember)
        self.step = self._timed("noise", self.noise.step)

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        self.spent[name] = 0.0

        def timed(*arguments: Any) -> Any:
            out = []
            synchronise(self.device)
            self.spent[name] += seconds(lambda: out.append(work(*arguments)), self.device)
            return out[0]

        return timed


def compare(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time the alternatives against each other, and print."""
    bench = Bench(size, device)
    worst = bench.check()
    rate = matmul_rate(DTYPES[size.student.dtype], device)
    found = interleaved({"cached": bench.cached, "plain": bench.plain, "uncached": bench.uncached}, repeats, device)
    parts = [bench.parts() for _ in range(repeats)]
    flops = {
        "cached": rollout_flops(size),
        "plain": rollout_flops(size, last_remembered=True),
        "uncached": rollout_flops(size, cached=False),
    }
    pixel_frames = size.clips * size.video.frames
    rows = [
        {
            "rollout": name,
            "seconds": one.median,
            "frames/s": pixel_frames / one.median,
            "of plain": one.ratio_to(found["plain"]),
            "of its floor": one.median / (flops[name] / rate),
            "peak_bytes": one.peak_bytes,
        }
        for name, one in found.items()
    ]
    split = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    print(f"{size.clips} x {size.video.frames} frames, {size.tokens} tokens a latent frame, {size.student.layers} "
          f"layers of {size.student.dim}; the same clips within {worst:.1e}; {rate / 1e9:,.0f} GFLOP/s")  # fmt: skip
    cells = [
        [row["rollout"], f"{row['seconds']:.3f}", f"{row['frames/s']:.1f}", f"{row['of plain']:.2f}",
         f"{row['of its floor']:.2f}", gib(row["peak_bytes"])]
        for row in rows
    ]  # fmt: skip
    print(markdown(["rollout", "s", "frames/s", "of plain", "of its floor", "peak GiB"], cells))
    print("cached: " + ", ".join(f"{name} {value:.3f} s" for name, value in split.items()))
    return {"size": size.name, "matmul": rate, "worst": worst, "rows": rows, "parts": split}


def lengths(size: Size, device: torch.device, repeats: int) -> dict[str, Any]:
    """Rollouts of more and more chunks, with a window and without, as they are streamed; and print."""
    net, text = size.net(device), size.text(device)
    bounded = Window(WINDOW_CHUNKS * net.chunk_frames)
    cache_bytes: dict[str, int] = {}

    def stream(window: Window, chunks: int, name: str) -> None:
        net.window = window
        frames = chunks * net.chunk_frames
        cache = net.memory(min(window.frames or frames, frames))
        for _ in rollout_chunks(net, text, size.noise(device), size.sampler, chunks, cache):
            pass
        cache_bytes[name] = sum(x.nbytes for x in (*cache.keys.values(), *cache.values.values()))

    work: dict[str, Callable[[], None]] = {}
    kinds = {"window": bounded, "all": EVERYTHING}
    for kind, window in kinds.items():
        for chunks in LENGTHS:
            name = f"{kind}, {chunks}"
            work[name] = lambda window=window, chunks=chunks, name=name: stream(window, chunks, name)
    found = interleaved(work, repeats, device)
    rows = []
    for kind in kinds:
        short = found[f"{kind}, {LENGTHS[0]}"]
        for chunks in LENGTHS:
            name = f"{kind}, {chunks}"
            row = {
                "sees": kind,
                "chunks": chunks,
                "seconds a chunk": found[name].median / chunks,
                "growth": found[name].ratio_to(short) * LENGTHS[0] / chunks,
                "cache_bytes": cache_bytes[name],
                "peak_bytes": found[name].peak_bytes,
            }
            rows.append(row)
    head = ["chunks see", "chunks", "s a chunk", f"of that at {LENGTHS[0]} chunks", "cache MiB", "peak GiB"]
    cells = [
        [f"{bounded.frames} frames" if row["sees"] == "window" else "all frames", str(row["chunks"]),
         f"{row['seconds a chunk']:.4f}", f"{row['growth']:.2f}", f"{row['cache_bytes'] / 2**20:.2f}",
         gib(row["peak_bytes"])]
        for row in rows
    ]  # fmt: skip
    print(markdown(head, cells))
    return {"size": size.name, "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NAMES, default="tiny")
    parser.add_argument("--window", action="store_true", help="seconds a chunk of longer and longer rollouts")
    device_options(parser)
    options = parser.parse_args()
    size, device = size_of(options.size), torch.device(options.device)
    repeats = options.repeats or REPEATS[size.name]
    print(f"{size.name}, {machine(device)}, medians of {repeats}")
    write_json(options.json, (lengths if options.window else compare)(size, device, repeats))


if __name__ == "__main__":
    main()
