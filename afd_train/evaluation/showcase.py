"""The report's gallery from measured clips: rows of teacher | base | student, chosen and labelled by one metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from afd_train.config import EvalConfig
from afd_train.evaluation import gallery, report
from afd_train.evaluation.clips import Clip
from afd_train.evaluation.compare import Row
from afd_train.evaluation.metric import Metric
from afd_train.evaluation.stats import failures_as_worst

TRACKED = "tracked"  # 0 where the physics metrics could not follow every body


def gallery_rows(
    clips: Sequence[Clip], rows: Sequence[Row], metric: Metric, config: EvalConfig, fps: float
) -> list[report.Row]:
    """Composed rows of the gallery.  `metric` is the primary one; nothing is shown where it was never measured."""
    measured = [row for row in rows if row.metric == config.primary_metric]
    values = _by_policy(measured, metric)
    adapted = "ema" if "ema" in values else "student"
    policies = [policy for policy in ("teacher", "base", adapted) if policy in values]
    if not policies:
        return []
    # Where there is no pair to compare, a policy against itself still gives evenly spaced prompts.
    student = values[policies[-1]]
    chosen = gallery.choose(student, values.get("base", student), metric.better, config.gallery_rows)
    by_id = {(clip.policy, clip.prompt_id, clip.take): clip for clip in clips}
    spoken = {
        (row.policy, row.prompt_id, row.take): (_spoken(row.value, metric), not np.isfinite(row.value))
        for row in measured
    }
    for row in rows:
        if row.metric == TRACKED and row.value == 0:
            clip = row.policy, row.prompt_id, row.take
            spoken[clip] = spoken[clip][0] + ", a body is lost", True
    return [
        _row(choice, [(policy, _take_of(by_id, policy, choice)) for policy in policies], spoken, config, fps)
        for choice in chosen
    ]


def _row(
    choice: gallery.Choice,
    shown: Sequence[tuple[str, Clip | None]],
    values: Mapping[tuple[str, str, int], tuple[str, bool]],
    config: EvalConfig,
    fps: float,
) -> report.Row:
    present = [(report.NAMES[policy], clip) for policy, clip in shown if clip is not None]
    spoken = [(name, *values[clip.policy, clip.prompt_id, clip.take]) for name, clip in present]
    reason = f"{choice.reason}, take {choice.take}; {report.plain(config.primary_metric)}"
    mp4 = gallery.compose([(report.NAMES[policy], clip.load() if clip else None) for policy, clip in shown], fps)
    return report.Row(present[0][1].prompt, reason, spoken, mp4)


def _by_policy(measured: Sequence[Row], metric: Metric) -> dict[str, dict[gallery.ClipId, float]]:
    """policy -> clip -> value, failures as the worst; {} where no clip was measured."""
    seen = np.array([row.value for row in measured])
    if not np.isfinite(seen).any():
        return {}
    values: dict[str, dict[gallery.ClipId, float]] = {}
    for row, value in zip(measured, failures_as_worst(seen, metric.better, seen).tolist(), strict=True):
        values.setdefault(row.policy, {})[row.prompt_id, row.take] = value
    return values


def _spoken(value: float, metric: Metric) -> str:
    return report.show(value, metric) if np.isfinite(value) else "failed"


def _take_of(by_id: Mapping[tuple[str, str, int], Clip], policy: str, choice: gallery.Choice) -> Clip | None:
    """The chosen take of a policy.  Takes of the teacher are other draws: its first stands in where it has fewer."""
    return by_id.get((policy, choice.prompt_id, choice.take)) or by_id.get((policy, choice.prompt_id, 0))
