"""What the KV cache and the detached context save: seconds of rollout and update on the quickstart's student.

    python tests/benchmarks/rollout.py [--clips 16] [--repeats 5]

Prints a table; the ratios matter, the seconds depend on the machine.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from afd_data.config import VideoConfig
from afd_train.flow import clean_from_velocity, noised
from afd_train.student_config import StudentConfig
from afd_train.students import Clip, Student, new_student
from afd_train.students.attention import KVCache

VIDEO = VideoConfig(width=16, height=16, frames=12, fps=8.0)


def student_of_the_quickstart() -> Student:
    """Random weights do: time does not depend on them."""
    return new_student(StudentConfig(ffn_dim=384, steps=(1000,), prediction="clean"), VIDEO, seed=0)


def cached_rollout(student: Student, clips: list[Clip]) -> torch.Tensor:
    """Chunk by chunk on a cache, as training and evaluation do."""
    return student.rollout(clips).clips


@torch.no_grad()
def uncached_rollout(student: Student, clips: list[Clip]) -> torch.Tensor:
    """The same clips, but every step runs over all chunks before it again."""
    net, noise, text = student.net, student.noise(clips), student.encode_text([clip.prompt for clip in clips])
    done: list[torch.Tensor] = []
    for _ in range(student.chunks):
        x = noise()
        clean = x
        for now, after in zip(student.times, [*student.times[1:], None], strict=True):
            both, t = torch.cat([*done, x], 1), torch.full((len(clips), net.chunk_frames), now)
            times = torch.cat([torch.zeros(len(clips), both.shape[1] - net.chunk_frames), t], 1).clamp_min(1e-6)
            clean = clean_from_velocity(x, net(both, times, text)[:, -net.chunk_frames :], t)
            if after is not None:
                x = noised(clean, noise(), torch.full_like(t, after))
        done.append(clean)
    return torch.cat(done, 1)


def updates(student: Student, clips: list[Clip]) -> dict[str, Callable[[], object]]:
    """Forward and backward of one update, with a detached context and with teacher forcing."""
    net, text = student.net, student.encode_text([clip.prompt for clip in clips])
    drawn = student.rollout(clips)
    noise = torch.randn(drawn.clips.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full(drawn.clips.shape[:2], student.times[0])
    noisy = noised(drawn.clips, noise, t)

    def detached() -> None:
        net.chunks(noisy, t, text, drawn.cache).square().mean().backward()

    def detached_with_prefill() -> None:
        cache = net.remember(drawn.clips[:, : -net.chunk_frames], text, KVCache())
        net.chunks(noisy, t, text, cache).square().mean().backward()

    def teacher_forced() -> None:
        net(noisy, t, text, clean=drawn.clips).square().mean().backward()

    return {"teacher-forced": teacher_forced, "detached, prefill": detached_with_prefill, "detached": detached}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after one to warm up."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(clips: int, repeats: int) -> dict[str, float]:
    """Seconds by part for a batch of `clips` clips."""
    student = student_of_the_quickstart()
    batch = [Clip(f"p{number}", "a red ball falls", 0, 0) for number in range(clips)]
    work: dict[str, Callable[[], object]] = {
        "rollout, uncached": lambda: uncached_rollout(student, batch),
        "rollout, cached": lambda: cached_rollout(student, batch),
        **{f"update, {name}": update for name, update in updates(student, batch).items()},
    }
    return {name: seconds(part, repeats) for name, part in work.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    found = measure(options.clips, options.repeats)
    print(f"{options.clips} clips of {VIDEO.frames} latent frames, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")  # fmt: skip
    for part in ("rollout", "update"):
        rows = {name: value for name, value in found.items() if name.startswith(part)}
        slowest = next(iter(rows.values()))
        for name, value in rows.items():
            print(f"  {name:28} {value:8.4f} s   {slowest / value:5.2f} x")


if __name__ == "__main__":
    main()
