"""A policy's motion as a share of the teacher's: the physics metric `motion` read the way it has to be read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from afd_train.evaluation import stats
from afd_train.evaluation.compare import Cell, Row
from afd_train.evaluation.metric import Metric

NAME, OF, TEACHER = "motion_of_teacher", "motion", "teacher"

METRICS = {
    NAME: Metric(
        "higher",
        "share of the teacher's",
        "Mean displacement of the bodies from frame to frame, as a share of the teacher's on the same prompts. The "
        "teacher's 100 % is the aim: more is not better. It follows from motion and is not tested again.",
    )
}


def cells(rows: Iterable[Row], resamples: int, seed: int) -> list[Cell]:
    """`NAME` of every policy; [] where the teacher does not move."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.metric == OF and np.isfinite(row.value):
            values.setdefault(row.policy, {}).setdefault(row.prompt_id, []).append(row.value)
    teacher = values.get(TEACHER, {})
    found = []
    for policy, prompts in values.items():
        shared = sorted(prompts.keys() & teacher.keys())
        own, wanted = (np.array([np.mean(of[prompt]) for prompt in shared]) for of in (prompts, teacher))
        if not shared or not wanted.mean() > 0:
            continue
        ratio = stats.ratio_interval(own, wanted, resamples, seed)
        lo, hi = (None if np.isnan(end) else end for end in (ratio.lo, ratio.hi))
        found.append(Cell(NAME, policy, ratio.mean, lo, hi, ratio.n, sum(map(len, prompts.values())), failed=0))
    return found
