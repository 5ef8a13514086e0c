"""Alarms: what stops a run, and what does not."""

import json
import logging
import math
from collections.abc import Iterable
from typing import Any

import pytest

from afd_train.alarm_config import AlarmsConfig, Collapse, Drift, RewardHacking
from afd_train.alarms import PATIENCE, START, Alarms, Diagnosis, DivergedError
from afd_train.config import TrainConfig
from afd_train.objective_config import DistilConfig

CONFIG = TrainConfig(stop_margin=10.0, stop_reference_distance=5.0)
MARGIN, DISTANCE = "discriminator/margin", "student/reference_distance"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_at_once(value):
    with pytest.raises(DivergedError, match=r"step 0: student/grad_norm is -?(nan|inf).*checkpoint is intact"):
        Alarms(CONFIG).check(0, {"student/loss": 0.1, "student/grad_norm": value})


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        (MARGIN, 10.5, r"margin has reached 10\.5 \(limit 10\).*discriminator\.learning_rate"),
        (DISTANCE, 5.5, r"reference_distance has reached 5\.5 \(limit 5\).*left its reference"),
    ],
)
def test_a_mean_beyond_its_limit_stops_with_what_to_do(key, value, advice):
    alarms = Alarms(CONFIG)
    for step in range(PATIENCE):
        alarms.check(step, {key: value})
    with pytest.raises(DivergedError, match=advice):
        alarms.check(PATIENCE, {key: value})


def test_a_value_at_its_limit_is_fine():
    alarms = Alarms(CONFIG)
    for step in range(3 * PATIENCE):
        alarms.check(step, {MARGIN: 10.0, DISTANCE: 5.0})


def test_a_single_outlier_is_not_an_alarm():
    # The mean moves by a tenth of the distance: 0.9 x 1 + 0.1 x 90 = 9.9.
    alarms = Alarms(CONFIG)
    for step in range(2 * PATIENCE):
        alarms.check(step, {MARGIN: 1.0})
    alarms.check(2 * PATIENCE, {MARGIN: 90.0})
    with pytest.raises(DivergedError, match=r"margin has reached 10\.1 "):
        alarms.check(2 * PATIENCE + 1, {MARGIN: 12.0})  # 0.9 x 9.9 + 0.1 x 12 = 10.11


def test_a_student_that_wins_is_no_alarm():
    alarms = Alarms(CONFIG)
    for step in range(2 * PATIENCE):
        alarms.check(step, {MARGIN: -50.0})


def test_metrics_without_a_limit_may_be_anything_finite():
    Alarms(CONFIG).check(0, {"student/loss": 1e30})


def test_resumed_alarms_go_off_at_the_same_step():
    unbroken = Alarms(CONFIG)
    for step in range(15):
        unbroken.check(step, {MARGIN: 20.0})
    resumed = Alarms(CONFIG)
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    for alarms in (unbroken, resumed):
        for step in range(15, PATIENCE):
            alarms.check(step, {MARGIN: 20.0})
        with pytest.raises(DivergedError):
            alarms.check(PATIENCE, {MARGIN: 20.0})


# Named diagnoses of adversarial training.  Metrics are at their start for five steps, and go where they end at once:
# after 20 more the running mean is within 0.9^20 = 12 % of the change.
HELD_OUT, PERMANENCE, MOTION = "discriminator/held_out_margin", "validation/object_permanence", "validation/motion"
DIVERSITY, SPREAD = "student/diversity", "advantage/spread"
OFF = AlarmsConfig(reward_hacking=None, collapse=None, drift=None)


def until_alarm(alarms: Alarms, rows: Iterable[tuple[int, dict[str, float]]]) -> Diagnosis | None:
    try:
        for step, row in rows:
            alarms.check(step, row)
    except DivergedError as error:
        return error.diagnosis
    return None


def diagnosis(rows: Iterable[dict[str, float]], measured: bool = True, **settings: Any) -> Diagnosis | None:
    """What is found in a run with this log."""
    alarms = Alarms(TrainConfig(**settings), measured)
    return until_alarm(alarms, enumerate(rows))


def went(start: dict[str, float], end: dict[str, float], steps: int = 60) -> list[dict[str, float]]:
    return [start] * START + [end] * (steps - START)


def named(found: Diagnosis | None) -> str | None:
    return found.name if found else None


@pytest.mark.parametrize(
    ("margin", "permanence", "expected"),
    [
        (1.5, 0.75, "reward hacking"),
        (1.5, 0.85, None),  # a fall of 0.05
        (2.5, 0.75, None),  # the student has not won over the discriminator
        (1.5, 0.95, None),  # both is what training is for
    ],
)
def test_pleasing_the_discriminator_while_objects_vanish_is_reward_hacking(margin, permanence, expected):
    rows = went({HELD_OUT: 3.0, PERMANENCE: 0.9}, {HELD_OUT: margin, PERMANENCE: permanence})
    assert named(diagnosis(rows)) == expected
    assert diagnosis(rows, alarms=OFF) is None
    assert diagnosis(rows, alarms=AlarmsConfig(reward_hacking=RewardHacking(margin_fall=None))) is None


def test_permanence_is_compared_with_its_best_and_the_message_says_what_fell():
    rows = [{HELD_OUT: 3.0, PERMANENCE: value} for value in (0.7, 0.95)] + [{HELD_OUT: 0.0, PERMANENCE: 0.8}] * 40
    found = diagnosis(rows)
    assert found is not None
    assert "object_permanence fell from 0.95 to 0.8" in found.message
    assert "margin between teacher and student fell from 1.2" in found.message  # mean of 3, 3, 0, 0, 0
    assert found.step == 27  # 26 after the fall: 1.2 - 3 x 0.9^26 = 1.006 is beyond 1, and 0.985 was not


@pytest.mark.parametrize(("distance", "expected"), [(0.6, "reward hacking"), (0.4, None)])
def test_where_permanence_is_not_measured_the_distance_counts(distance, expected):
    rows = went({HELD_OUT: 3.0, DISTANCE: 0.1}, {HELD_OUT: 1.5, DISTANCE: distance})
    assert named(diagnosis(rows, measured=False)) == expected  # half of the limit 1
    assert diagnosis(rows, measured=True) is None


@pytest.mark.parametrize(
    ("key", "start", "end", "expected"),
    [
        (DIVERSITY, 0.5, 0.14, "collapse"),
        (DIVERSITY, 0.5, 0.16, None),  # 0.3 x 0.5 = 0.15
        (SPREAD, 2.0, 0.05, "collapse"),
        (SPREAD, 2.0, 0.15, None),
    ],
)
def test_rollouts_that_become_alike_are_a_collapse(key, start, end, expected):
    rows = went({key: start}, {key: end}, steps=100)
    assert named(diagnosis(rows)) == expected
    assert diagnosis(rows, alarms=AlarmsConfig(collapse=Collapse(diversity=None, spread=None))) is None


def test_a_student_that_always_drew_alike_has_not_collapsed():
    assert diagnosis([{DIVERSITY: 0.0, SPREAD: 0.0}] * 50) is None


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(4.0, 1.5, "drift"), (4.0, 1.7, None), (4.0, 10.5, "drift"), (4.0, 9.5, None), (0.4, 8.0, None)],
)
def test_motion_far_from_that_at_the_start_is_drift(start, end, expected):
    rows = [{MOTION: start}, {}, {MOTION: end}]
    assert named(diagnosis(rows)) == expected
    assert diagnosis(rows, alarms=AlarmsConfig(drift=Drift(motion=None))) is None


def test_a_student_far_from_its_reference_drifts():
    found = diagnosis([{DISTANCE: 6.0}] * 30, stop_reference_distance=5.0)
    assert found is not None
    assert (found.name, found.step) == ("drift", PATIENCE)
    assert diagnosis([{DISTANCE: 6.0}] * 30, stop_reference_distance=None) is None


def test_steady_growth_is_drift_before_the_limit_where_a_forecast_is_asked_for():
    # 0.01 a step: beyond 1 at step 100 and its mean about 10 later; 30 steps before that it can be foreseen.
    rows = [{DISTANCE: 0.01 * step} for step in range(200)]
    late, early = diagnosis(rows), diagnosis(rows, alarms=AlarmsConfig(drift=Drift(forecast_steps=30)))
    assert late is not None
    assert early is not None
    assert 107 <= late.step <= 111
    assert 77 <= early.step <= 81
    assert diagnosis([{DISTANCE: 0.9}] * 200, alarms=AlarmsConfig(drift=Drift(forecast_steps=30))) is None


def test_objectives_without_a_discriminator_have_no_such_diagnoses():
    rows = went({MOTION: 4.0, DIVERSITY: 1.0}, {MOTION: 0.1, DIVERSITY: 0.01})
    assert named(diagnosis(rows)) is not None
    assert diagnosis(rows, objective=DistilConfig()) is None


def test_a_warning_is_said_once_a_diagnosis_and_again_by_no_resumed_run(caplog):
    config = TrainConfig(on_alarm="warn", stop_margin=1.0)
    alarms = Alarms(config)
    with caplog.at_level(logging.WARNING):
        for step in range(40):
            alarms.check(step, {MARGIN: 2.0, DISTANCE: 3.0})
        resumed = Alarms(config)
        resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
        resumed.check(40, {MARGIN: 2.0, DISTANCE: 3.0})
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in said] == ["certain discriminator", "drift"]
    assert all("training goes on" in text for text in said)


def test_processes_other_than_the_first_warn_of_nothing(caplog):
    alarms = Alarms(TrainConfig(on_alarm="warn", stop_margin=1.0), speaks=False)
    with caplog.at_level(logging.WARNING):
        for step in range(40):
            alarms.check(step, {MARGIN: 2.0})
    assert not caplog.records
    assert alarms.state_dict()["told"] == ["certain discriminator"]


def test_a_value_that_is_not_finite_is_more_than_a_warning():
    with pytest.raises(DivergedError):
        Alarms(TrainConfig(on_alarm="warn")).check(0, {"student/loss": math.nan})


def test_resumed_diagnoses_are_those_of_an_unbroken_run():
    rows = went({HELD_OUT: 3.0, PERMANENCE: 0.9, DIVERSITY: 1.0}, {HELD_OUT: 1 / 3, PERMANENCE: 0.7, DIVERSITY: 0.9})
    unbroken, broken = Alarms(TrainConfig(), True), Alarms(TrainConfig(), True)
    for step in range(12):
        unbroken.check(step, rows[step])
        broken.check(step, rows[step])
    resumed = Alarms(TrainConfig(), True)
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    rest = [*enumerate(rows)][12:]
    found = until_alarm(unbroken, rest)
    assert named(found) == "reward hacking"
    assert until_alarm(resumed, rest) == found
    assert resumed.state_dict() == unbroken.state_dict()
