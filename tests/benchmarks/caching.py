"""What a cache costs beside its videos: time over encoding and tar alone, and memory over many prompts.

    python -m tests.benchmarks.caching overhead [--sizes small medium large] [--repeats 3]
    python -m tests.benchmarks.caching memory [--samples 1000 10000 100000]

overhead: the teacher hands over prepared frames, encoded in `fetch`.  The floor is the same threads encoding the same
frames with `write_mp4`, and one TarWriter for videos and records; nothing in it decodes, hashes or is made durable.
What a run does once (the card with its picture) is measured again alone and taken off.
memory: the most that a process holds which caches tiny videos, from the prompt file to the card; in a folder in memory
where there is one, since it is not the disk that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afd_data.cache import cache_teacher
from afd_data.card import write_card
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.prompts import Prompt, load_prompts, prompt_id
from afd_data.teachers import Delivery, Free, Identity, Request
from afd_data.video import write_mp4
from tests.benchmarks.timing import markdown

SIZES = {  # videos, and how each looks
    "small": (256, VideoConfig(width=64, height=64, frames=24, fps=8.0)),
    "medium": (48, VideoConfig(width=480, height=272, frames=49, fps=16.0)),
    "large": (8, VideoConfig(width=832, height=480, frames=81, fps=16.0)),
}
WORKERS = 2
FLOOR = "encode + tar"


class Prepared(Free):
    """Hands over the same frames for every prompt: uint8 [F, H, W, 3], encoded anew each time where `mp4` is None."""

    def __init__(self, frames: np.ndarray, paid: bool, mp4: bytes | None = None) -> None:
        self.identity = Identity("prepared", "1", {}, paid=paid)
        self._frames, self._mp4 = frames, mp4

    def prompts(self) -> list[str]:
        return []

    def submit(self, request: Request) -> str:
        return request.fingerprint

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        if self._mp4 is None:
            write_mp4(target, self._frames, request.video)
        else:
            target.write_bytes(self._mp4)
        return Delivery(effective=request.video.model_dump())


def recipe(video: VideoConfig, **cache: object) -> DataConfig:
    """All prompts show the same here, so twins are let through."""
    return DataConfig(
        out="unused",
        video=video,
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(workers=WORKERS, near_duplicate=-1, **cache),  # pyright: ignore[reportArgumentType]
    )


def footage(video: VideoConfig) -> np.ndarray:
    """uint8 [F, H, W, 3]: a smooth texture that drifts, under a little grain, so that it costs what footage costs."""
    import cv2

    random = np.random.default_rng(0)
    side = 16 + max(video.width, video.height) // 8
    coarse = random.integers(0, 256, (side, side, 3), np.uint8)
    scene = cv2.resize(coarse, (8 * side, 8 * side), interpolation=cv2.INTER_CUBIC)
    grain = random.normal(0, 2, (video.height, video.width, 3))
    crops = [scene[f : f + video.height, 2 * f : 2 * f + video.width] for f in np.arange(video.frames) % 60]
    return np.stack([np.clip(np.roll(grain, 7 * f, 1) + crop, 0, 255).astype(np.uint8) for f, crop in enumerate(crops)])


# Overhead


@dataclass
class Spent:
    """Seconds of a run: by the clock, and of this process's threads on the CPUs."""

    wall_s: float
    cpu_s: float


def spent(work: Callable[[Path], object], folder: Path, once: Callable[[Path], object] | None) -> Spent:
    """Of one call in an empty folder, which is removed again; less what `once` takes there."""
    folder.mkdir()
    os.sync()  # what others left to be written is not ours to wait for
    walls, cpus = [time.perf_counter()], [time.process_time()]
    for part in (work, once or (lambda _: None)):
        part(folder)
        walls.append(time.perf_counter())
        cpus.append(time.process_time())
    shutil.rmtree(folder)
    return Spent(2 * walls[1] - walls[0] - walls[2], 2 * cpus[1] - cpus[0] - cpus[2])


def encode_and_tar(folder: Path, frames: np.ndarray, video: VideoConfig, count: int, record: bytes) -> None:
    """The floor."""
    from webdataset.writer import TarWriter

    def encode(number: int) -> tuple[str, bytes]:
        path = folder / f"{number}.mp4"
        write_mp4(path, frames, video)
        data = path.read_bytes()
        path.unlink()
        return f"{number:08d}", data

    with TarWriter(str(folder / "floor.tar"), encoder=False) as writer, ThreadPoolExecutor(WORKERS) as pool:
        for key, mp4 in pool.map(encode, range(count)):
            writer.write({"__key__": key, "mp4": mp4, "json": record})


def overhead(names: list[str], repeats: int, out: Path) -> str:
    """A table: what a video takes in the floor and in a cache of a free and of a paid teacher, and the ratios."""
    rows = []
    for name in names:
        count, video = SIZES[name]
        found = _rounds(count, video, repeats, out)
        for way, times in found.items():
            floor = found[FLOOR]
            wall = statistics.median(a.wall_s / b.wall_s for a, b in zip(times, floor, strict=True))
            cpu = statistics.median(a.cpu_s / b.cpu_s for a, b in zip(times, floor, strict=True))
            wall_ms = 1000 * statistics.median(one.wall_s for one in times) / count
            cpu_ms = 1000 * statistics.median(one.cpu_s for one in times) / count
            shape = f"{video.width}x{video.height}x{video.frames}"
            rows.append([shape, way, f"{wall_ms:.1f}", f"{cpu_ms:.1f}", f"{wall:.2f}", f"{cpu:.2f}"])
    return markdown(["video", "way", "ms a video", "CPU ms a video", "of the floor", "CPU of the floor"], rows)


def _rounds(count: int, video: VideoConfig, repeats: int, out: Path) -> dict[str, list[Spent]]:
    frames, record = footage(video), b"{" + b" " * 1200 + b"}"
    prompts = [Prompt(prompt_id(str(number)), str(number), "train") for number in range(count)]

    def cached(paid: bool) -> Callable[[Path], object]:
        return lambda folder: cache_teacher(recipe(video), prompts, folder, Prepared(frames, paid), progress=False)

    work = {
        FLOOR: lambda folder: encode_and_tar(folder, frames, video, count, record),
        "free": cached(paid=False),
        "paid": cached(paid=True),
    }
    found: dict[str, list[Spent]] = {way: [] for way in work}
    for number in range(repeats + 1):
        first = number % len(work)
        for way in [*work][first:] + [*work][:first]:
            one = spent(work[way], out / way, once=None if way == FLOOR else write_card)
            if number:  # the first round warms up
                found[way].append(one)
    return found


# Memory


def memory(counts: list[int]) -> str:
    """A table: peak memory of a process for each number of prompts."""
    found = []
    for count in counts:
        command = [sys.executable, "-m", "tests.benchmarks.caching", "one", "--samples", str(count)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
    rows = []
    for count, this in zip(counts, found, strict=True):
        more = (this["peak"] - found[0]["peak"]) / max(1, count - counts[0])
        listed = this["prompts"] / count
        rows.append([str(count), f"{this['peak'] / 1e6:.0f}", f"{more:.0f}", f"{listed:.0f}", f"{this['seconds']:.0f}"])
    return markdown(["prompts", "peak MB", "bytes a prompt above the first", "of which the prompts", "s"], rows)


def one(count: int, out: Path) -> None:
    """Cache `count` videos of 16x16x4 in this process, and print what it held."""
    video = VideoConfig(width=16, height=16, frames=4)
    write_mp4(out / "prepared.mp4", footage(video), video)
    teacher = Prepared(footage(video), paid=False, mp4=(out / "prepared.mp4").read_bytes())
    with open(out / "prompts.txt", "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f"ball {number} rolls over a table of wood and falls into box {number * 7919 % 100003} while ")
            file.write(f"{number * 104729 % 99991} birds look on from the window and sing a song about it all\n")
    before = _resident()
    began = time.perf_counter()
    prompts = load_prompts(PromptsConfig(source="prompts.txt", test=50, validation=50), out)
    listed = _resident() - before
    cache_teacher(recipe(video), prompts, out / "cache", teacher, progress=False)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak": peak, "prompts": listed, "seconds": time.perf_counter() - began}))


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["overhead", "memory", "one"])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["small", "medium"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    options = parser.parse_args()
    shared = "/dev/shm" if options.part == "one" and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="caching-", dir=shared) as folder:
        match options.part:
            case "overhead":
                print(overhead(options.sizes, options.repeats, Path(folder)))
            case "memory":
                print(memory(options.samples))
            case "one":
                one(options.samples[0], Path(folder))


if __name__ == "__main__":
    main()
