"""Diagnoses a run that goes wrong before it overwrites the last good checkpoint.

`not finite`: any value of the log.  `certain discriminator`: its mean margin beyond train.stop_margin.  `drift`,
`reward hacking`, `collapse`: see `AlarmsConfig`, which has the thresholds and says what "at the start" is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from afd_data.errors import UserError
from afd_train.alarm_config import AlarmsConfig, RewardHacking
from afd_train.config import TrainConfig
from afd_train.objective_config import ADVERSARIAL

log = logging.getLogger(__name__)

MEMORY = 0.9  # weight of the past in the running means that alarms look at
PATIENCE = 20  # steps before a running mean means something
START = 5  # values whose mean is that at the start
STANDING_STILL = 0.5  # units/s; of a base that moves no more, no motion is a multiple

MARGIN, DISTANCE = "discriminator/margin", "student/reference_distance"
HELD_OUT, DIVERSITY, SPREAD = "discriminator/held_out_margin", "student/diversity", "advantage/spread"
PERMANENCE, MOTION = "validation/object_permanence", "validation/motion"


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong, after which step."""

    name: str
    step: int
    message: str


class DivergedError(UserError):
    """A run that must not go on; the message is its diagnosis, by name."""

    def __init__(self, diagnosis: Diagnosis):
        super().__init__(f"{diagnosis.name}: {diagnosis.message}")
        self.diagnosis = diagnosis


@dataclass
class Seen:
    """A metric so far: mean of its first values, largest, running mean, and how fast that moves a step."""

    count: int = 0
    start: float = 0.0
    best: float = -math.inf
    mean: float = 0.0
    pace: float = 0.0

    def add(self, value: float, memory: float, first: int) -> None:
        """`memory`: weight of the past in the mean; `first`: number of values that are the start."""
        self.count += 1
        if self.count <= first:
            self.start += (value - self.start) / self.count
        before = self.mean if self.count > 1 else value
        self.mean = memory * before + (1 - memory) * value
        self.pace = memory * self.pace + (1 - memory) * (self.mean - before)
        self.best = max(self.best, value)


@dataclass
class _State:
    steps: int = 0
    seen: dict[str, Seen] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # diagnoses that were warned of


class Alarms:
    """Watches the log of a run; all processes see the same one."""

    def __init__(self, config: TrainConfig, measured: bool = False, speaks: bool = True):
        """`measured`: validation measures object permanence; `speaks`: of several processes one is enough."""
        self._config, self._measured, self._speaks = config, measured, speaks
        watched = config.alarms if config.objective.name in ADVERSARIAL else _NONE
        self._hacking, self._collapse, self._drift = watched.reward_hacking, watched.collapse, watched.drift
        self._state = _State()

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises DivergedError for a value that is not finite, and for other diagnoses unless they are to warn only."""
        for key, value in metrics.items():
            if not math.isfinite(value):
                advice = (
                    f"step {step}: {key} is {value}. The last checkpoint is intact. Lower train.learning_rate or "
                    "train.max_grad_norm and run again with another `--set out=FOLDER --set stream.folder=THIS/cache`."
                )
                raise DivergedError(Diagnosis("not finite", step, advice))
        self._remember(metrics)
        for name, problem in self._found():
            message = f"step {step}: {problem}."
            if self._config.on_alarm != "warn":
                raise DivergedError(Diagnosis(name, step, f"{message} The last checkpoint is intact."))
            if name not in self._state.told:
                self._state.told.append(name)
                if self._speaks:
                    log.warning(f"{name}: {message} train.on_alarm is warn: training goes on.")

    def state_dict(self) -> dict:
        """JSON-able."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping) -> None:
        """Inverse of `state_dict`."""
        seen = {key: Seen(**values) for key, values in state["seen"].items()}
        self._state = _State(int(state["steps"]), seen, list(state["told"]))

    def _remember(self, metrics: Mapping[str, float]) -> None:
        self._state.steps += 1
        for key in (MARGIN, DISTANCE, HELD_OUT, DIVERSITY, SPREAD, PERMANENCE, MOTION):
            if key in metrics:
                rare = key in (PERMANENCE, MOTION)  # measured at few steps, on many clips
                seen = self._state.seen.setdefault(key, Seen())
                seen.add(metrics[key], 0.0 if rare else MEMORY, 1 if rare else START)

    def _found(self) -> Iterator[tuple[str, str]]:
        """Name and sentence of all that is wrong."""
        if self._state.steps > PATIENCE:
            yield from self._certain()
            yield from self._far()
            yield from self._hacked()
            yield from self._alike()
        yield from self._moving_otherwise()

    def _certain(self) -> Iterator[tuple[str, str]]:
        margin, limit = self._state.seen.get(MARGIN), self._config.stop_margin
        if margin and limit is not None and margin.mean > limit:
            yield (
                "certain discriminator",
                f"{_reached(MARGIN, margin, limit)}: the discriminator tells teacher from student with certainty, so "
                "that its scores no longer rank rollouts. Lower discriminator.learning_rate or warmup_steps, raise "
                "discriminator.input_noise, or set discriminator.band",
            )

    def _far(self) -> Iterator[tuple[str, str]]:
        distance, limit = self._state.seen.get(DISTANCE), self._config.stop_reference_distance
        if distance is None or limit is None:
            return
        advice = "Lower train.learning_rate, or raise objective.prior_weight"
        ahead = self._drift.forecast_steps if self._drift else None
        if distance.mean > limit:
            yield "drift", f"{_reached(DISTANCE, distance, limit)}: the student has left its reference. {advice}"
        elif ahead is not None and distance.mean + ahead * distance.pace > limit:
            yield (
                "drift",
                f"{DISTANCE} is {distance.mean:.3g} and grows by {distance.pace:.3g} a step, beyond its limit "
                f"{limit:g} in less than {ahead} steps: the student is leaving its reference. {advice}",
            )

    def _hacked(self) -> Iterator[tuple[str, str]]:
        margin, config = self._state.seen.get(HELD_OUT), self._hacking
        if margin is None or config is None or config.margin_fall is None:
            return
        if margin.start - margin.mean <= config.margin_fall:
            return
        if worse := self._worse(config):
            yield (
                "reward hacking",
                f"on held-out prompts the margin between teacher and student fell from {margin.start:.3g} to "
                f"{margin.mean:.3g}, but {worse}: the student pleases the discriminator, and gets worse. Raise "
                "discriminator.learning_rate, or lower train.learning_rate",
            )

    def _worse(self, config: RewardHacking) -> str | None:
        if self._measured:
            seen = self._state.seen.get(PERMANENCE)
            fell = seen is not None and seen.best - seen.mean > config.permanence_fall
            return f"{PERMANENCE} fell from {seen.best:.3g} to {seen.mean:.3g}" if seen and fell else None
        distance, limit = self._state.seen.get(DISTANCE), self._config.stop_reference_distance
        far = distance is not None and limit is not None and distance.mean > config.distance_share * limit
        return f"{DISTANCE} is {distance.mean:.3g} (limit {limit:g})" if distance and far else None

    def _alike(self) -> Iterator[tuple[str, str]]:
        if self._collapse is None:
            return
        for key, share, what in (
            (DIVERSITY, self._collapse.diversity, "rollouts of one prompt have become alike"),
            (SPREAD, self._collapse.spread, "the discriminator scores all rollouts of one prompt alike"),
        ):
            seen = self._state.seen.get(key)
            if seen and share is not None and seen.mean < share * seen.start:
                yield (
                    "collapse",
                    f"{key} fell from {seen.start:.3g} to {seen.mean:.3g}, below {share:g} of it: {what}. Lower "
                    "train.learning_rate, or let the old policy lag more (objective.old_policy_decay)",
                )

    def _moving_otherwise(self) -> Iterator[tuple[str, str]]:
        seen = self._state.seen.get(MOTION)
        if seen is None or self._drift is None or self._drift.motion is None or seen.start < STANDING_STILL:
            return
        low, high = self._drift.motion
        if not low * seen.start <= seen.mean <= high * seen.start:
            yield (
                "drift",
                f"{MOTION} went from {seen.start:.3g} to {seen.mean:.3g} units/s, outside [{low:g}, {high:g}] of it: "
                "the student's videos move unlike those at the start. Lower train.learning_rate",
            )


_NONE = AlarmsConfig(reward_hacking=None, collapse=None, drift=None)


def _reached(key: str, seen: Seen, limit: float) -> str:
    return f"{key} has reached {seen.mean:.3g} (limit {limit:g})"
