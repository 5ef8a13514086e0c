"""A student -> its numbers on a split's prompts: exact physics, and its videos against the teacher's as a set.

Videos are measured as they are drawn; the teacher's went through a lossless codec.  Shares are in %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from afd_data.stream import Stream
from afd_train.config import Recipe
from afd_train.evaluation import distribution, quantities
from afd_train.evaluation.evaluate import world_of
from afd_train.evaluation.physics import Observation, observe, score
from afd_train.evaluation.trajectory import trajectory_error
from afd_train.students import Student
from afd_train.validation import prompts_of

Values = dict[str, float]
# Name in distribution or quantities -> ours.
OF_SETS = {
    distribution.NAME: "mmd",
    **{f"{quantities.PREFIX}{name}": f"W1 {name}" for name in quantities.QUANTITIES},
}
RESAMPLES = 100  # of the sets' intervals, which are not used here: training seeds give ours


@dataclass(frozen=True)
class Shown:
    """A number of the table: its heading, which way is better, its decimals, and where it comes from."""

    title: str
    better: str  # higher, lower, teacher (the nearer to the teacher's)
    decimals: int
    measured: str | None = None  # name in physics.METRICS
    scale: float = 1.0


METRICS: Mapping[str, Shown] = {
    "perm": Shown("object permanence %", "higher", 1, "object_permanence", 100),
    "phys": Shown("all physics right %", "higher", 1, "physics_ok", 100),
    "path": Shown("off the teacher's path, units", "lower", 3),
    "dyn": Shown("motion, % of teacher", "teacher", 1),
    "mmd": Shown("MMD² x 1000", "lower", 1),
    "diversity": Shown("diversity, % of teacher", "teacher", 1),
    "ghost": Shown("ghost mass %", "lower", 1, "ghost_mass", 100),
    "g error": Shown("gravity error", "lower", 3, "gravity_error"),
    "bounce error": Shown("restitution error", "lower", 3, "restitution_error"),
    "energy": Shown("energy rise", "lower", 3, "energy_rise"),
    "jump": Shown("jumps %", "lower", 1, "jump", 100),
    "W1 speed": Shown("W1 of start speeds", "lower", 2),
    "W1 gravity": Shown("W1 of gravities", "lower", 1),
    "W1 restitution": Shown("W1 of restitutions", "lower", 3),
}


@dataclass(frozen=True)
class Measured:
    """Videos of some prompts x takes, reduced to numbers."""

    physics: Values  # of physics.METRICS, means over videos
    seen: dict[str, list[Observation]]  # prompt id -> what every take shows
    features: dict[str, np.ndarray]  # prompt id -> [takes, D]
    quantities: dict[str, np.ndarray]  # prompt id -> [takes, 3]


class Reference:
    """The teacher's videos of a split, which all students are measured against."""

    def __init__(self, cache: Path, recipe: Recipe, split: str):
        """Raises UserError where the cache has no such split."""
        stream = Stream(cache, recipe.stream, split, seed=0)
        self.prompts = prompts_of(stream, recipe.eval.prompts)
        self._fps = recipe.video.fps
        self._determined = world_of(recipe).determined
        videos = [[stream.example(key).video for key in stream.takes(prompt_id)] for prompt_id, _ in self.prompts]
        self._teacher = self._reduced(videos)

    def teacher(self) -> Values:
        """The teacher's own row; its distance is that between its even and its odd takes: the floor."""
        return self._values(self._teacher)

    def measured(self, student: Student, seed: int, takes: int) -> Values:
        """A student's row, its videos drawn with the noise of `seed`."""
        return self._values(self._reduced(student.videos(self.prompts, seed, takes)))

    def _reduced(self, videos: Sequence[Sequence[np.ndarray]] | np.ndarray) -> Measured:
        rows, seen_of, features, measured = [], {}, {}, {}
        for (prompt_id, prompt), takes in zip(self.prompts, videos, strict=True):
            seen = [observe(video, self._fps, prompt) for video in takes]
            rows += [score(observation) for observation in seen]
            seen_of[prompt_id] = seen
            features[prompt_id] = np.stack([distribution.features(video) for video in takes])
            measured[prompt_id] = np.stack([quantities.measured(observation) for observation in seen])
        physics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return Measured(physics, seen_of, features, measured)

    def _values(self, found: Measured) -> Values:
        values = {
            name: shown.scale * found.physics[shown.measured] for name, shown in METRICS.items() if shown.measured
        }
        if self._determined:
            values["path"] = self._path_error(found)
        values["dyn"] = 100 * found.physics["motion"] / self._teacher.physics["motion"]
        if spread := diversity(self._teacher.features):
            values["diversity"] = 100 * diversity(found.features) / spread
        return values | self._distances(found)

    def _path_error(self, found: Measured) -> float:
        """Mean distance to where the teacher's body is in the first take of the prompt, in units."""
        errors = [
            trajectory_error(seen.seen.positions, self._teacher.seen[prompt_id][0].seen.positions, seen.room)
            for prompt_id, takes in found.seen.items()
            for seen in takes
        ]
        return float(np.mean(errors))

    def _distances(self, found: Measured) -> Values:
        """To the teacher's videos as a set."""
        own = distribution.TEACHER if found is self._teacher else "student"
        both = {distribution.TEACHER: self._teacher, own: found}
        cells, _, _ = distribution.compare_sets({name: one.features for name, one in both.items()}, RESAMPLES, seed=0)
        others, _, _ = quantities.set_distances({name: one.quantities for name, one in both.items()}, RESAMPLES, seed=0)
        return {OF_SETS[cell.metric]: cell.mean for cell in [*cells, *others] if cell.policy == own}


def diversity(features: Mapping[str, np.ndarray]) -> float:
    """Mean distance between two takes of one prompt; 0 where no prompt has two.  features: prompt id -> [takes, D]."""
    distances = [
        float(np.linalg.norm(takes[i] - takes[j]))
        for takes in features.values()
        for i in range(len(takes))
        for j in range(i)
    ]
    return float(np.mean(distances)) if distances else 0.0
