"""Alarms: what stops a run, and what does not."""

import json
import math

import pytest

from afd_train.alarms import PATIENCE, Alarms, DivergedError
from afd_train.config import TrainConfig

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
