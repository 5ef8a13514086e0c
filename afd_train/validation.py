"""The same held-out prompts with the same noise: a strip of videos, and exact metrics where they exist."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

import numpy as np
import torch

from afd_data.config import VideoConfig
from afd_data.stream import Stream
from afd_data.video import write_mp4
from afd_train.diagnostics import Diagnostics
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.judge import Judge

NOISE_SEED = 2**30  # of validation; far from the seeds of training steps
STRIP_CLIPS = 8
STRIP_PIXELS = 96  # side to which small clips are enlarged
STRIP_WIDTH = 2048  # a strip of large clips holds fewer of them


class Validation:
    """Draws the averaged student on held-out prompts.

    exact: whether physics are measured.
    """

    def __init__(self, setup: Setup, folder: Path, exact: bool, judge: Judge | None = None):
        """`exact`: the prompts are of the playground, whose physics can be measured.

        Where no prompts are held out, training prompts are drawn, and nothing is measured on them.
        """
        self._setup = setup
        self._folder = folder
        self.exact = exact and setup.held_out is not None
        limit = setup.config.validation_prompts
        # Where nothing is measured, no more are drawn than the strip shows.
        shown = min(limit, STRIP_CLIPS, fitting(setup.student.video))
        self._diagnostics = Diagnostics(setup, judge, self.exact) if judge else None
        self._limit = limit if self.exact else shown

    def run(self, step: int) -> Metrics:
        """Write the strip of `step` and return means over the clips, as `validation/...`, and the discriminator's.

        All processes draw, and all get the same.
        """
        setup, processes = self._setup, self._setup.processes
        # Of the generation that is read now, whatever was read when the run was started or resumed.
        prompts = prompts_of(setup.held_out or setup.stream, self._limit)
        # As many for each, since sharded processes gather weights together.
        padded = -(-len(prompts) // processes.count) * processes.count
        own = [prompts[i % len(prompts)] for i in range(processes.index, padded, processes.count)]
        with setup.watch("validation"):
            with setup.trainee.acting("ema") as net, processes.unsharded(net):
                videos = setup.student.videos(own, NOISE_SEED, takes=1, batch=setup.config.clips_per_pass or len(own))
            setup.student.autoencoder.release()
            videos = processes.gather(torch.from_numpy(videos[:, 0])).numpy()[: len(prompts)]
            found = self._found(videos, prompts, step) if processes.main else {}
            metrics = json.loads(processes.agree_text(json.dumps(found)))
        return metrics | (self._diagnostics.run() if self._diagnostics else {})

    def _found(self, videos: np.ndarray, prompts: list[tuple[str, str]], step: int) -> Metrics:
        self._write_strip(videos[:STRIP_CLIPS], step, self._setup.student.video.fps)
        return self._measure(videos, prompts) if self.exact else {}

    def _measure(self, videos: np.ndarray, prompts: list[tuple[str, str]]) -> Metrics:
        from afd_train.evaluation.physics import measure

        fps = self._setup.student.video.fps
        rows = [measure(video, fps, prompt) for video, (_, prompt) in zip(videos, prompts, strict=True)]
        return {f"validation/{key}": float(np.mean([row[key] for row in rows])) for key in rows[0]}

    def _write_strip(self, videos: np.ndarray, step: int, fps: float) -> None:
        """Clips side by side, enlarged to be visible: uint8 [N, F, H, W, 3] -> one mp4."""
        factor = enlargement(self._setup.student.video)
        large = videos[: fitting(self._setup.student.video)].repeat(factor, 2).repeat(factor, 3)
        strip = np.concatenate(list(large), axis=2)
        self._folder.mkdir(parents=True, exist_ok=True)
        config = VideoConfig(width=strip.shape[2], height=strip.shape[1], frames=len(strip), fps=fps)
        write_mp4(self._folder / f"step-{step:06d}.mp4", strip, config)


def enlargement(video: VideoConfig) -> int:
    """By how much a strip's clips are enlarged."""
    return max(1, STRIP_PIXELS // video.height)


def fitting(video: VideoConfig) -> int:
    """How many clips fit side by side into a strip."""
    return max(1, STRIP_WIDTH // (enlargement(video) * video.width))


def prompts_of(stream: Stream, limit: int | None = None, known: Set[str] = frozenset()) -> list[tuple[str, str]]:
    """(id, text) of the first `limit` prompts of a split, by id, without those in `known`; of all by default."""
    first = {stream.places[key].prompt_id: key for key in reversed(stream.keys)}
    return [(prompt_id, stream.example(first[prompt_id]).prompt) for prompt_id in sorted(first.keys() - known)[:limit]]
