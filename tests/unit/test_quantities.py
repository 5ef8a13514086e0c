"""Distances between the distributions of measured physics, on numbers whose distance is known by hand."""

import math

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from afd_data.config import VideoConfig
from afd_data.teachers.scene import BACKGROUND
from afd_data.teachers.world import simulate
from afd_train.evaluation import physics, quantities, relative
from afd_train.evaluation.compare import Row
from afd_train.evaluation.trajectory import trajectory_error

PROMPTS = [f"p{index:02d}" for index in range(20)]
THROWN = "A medium red ball that is very bouncy is thrown to the right in normal gravity"


def alike(value: float, takes: int = 2) -> dict[str, np.ndarray]:
    """Every video shows `value` as its speed, gravity and restitution."""
    return {prompt: np.full((takes, 3), value) for prompt in PROMPTS}


def drawn(shift: float, seed: int, takes: int = 4) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {prompt: generator.normal(shift, 1, (takes, 3)) for prompt in PROMPTS}


def test_the_distance_of_weighted_samples_is_the_area_between_their_distribution_functions():
    # {0, 1} with weights 1 : 3 against {2}: 1/4 of the mass goes 2 far, 3/4 go 1 far.
    found = quantities.wasserstein_1(np.array([0.0, 1]), np.array([[1.0, 3]]), np.array([2.0]), np.array([[1.0]]))
    assert found == pytest.approx([0.25 * 2 + 0.75 * 1])


def test_distances_of_many_weightings_agree_with_scipy(monkeypatch):
    monkeypatch.setattr(quantities, "CHUNK", 60)  # more than one piece
    rng = np.random.default_rng(0)
    x, y, x_weights, y_weights = rng.normal(size=9), rng.normal(size=7), rng.random((12, 9)), rng.random((12, 7))
    oracle = [wasserstein_distance(x, y, u, v) for u, v in zip(x_weights, y_weights, strict=True)]
    assert quantities.wasserstein_1(x, x_weights, y, y_weights) == pytest.approx(oracle)


def test_the_distance_of_two_values_is_their_difference():
    policies = {"teacher": alike(5.0), "ema": alike(5.5), "base": alike(7.0)}
    cells, comparisons, skipped = quantities.set_distances(policies, 200, seed=0)
    means = {(cell.metric, cell.policy): cell.mean for cell in cells}
    for name in ("w1_speed", "w1_gravity", "w1_restitution"):
        assert means[name, "base"] == pytest.approx(2.0)
        assert means[name, "ema"] == pytest.approx(0.5)
        assert means[name, "teacher"] == 0.0
    assert {(found.a, found.b, round(found.delta, 9)) for found in comparisons} == {("ema", "base", -1.5)}
    assert skipped == {}


def test_videos_that_show_no_such_quantity_are_left_out_and_counted():
    shown = alike(5.5)
    for prompt in PROMPTS[:5]:
        shown[prompt][0, 1] = math.nan
    cells, _, _ = quantities.set_distances({"teacher": alike(5.0), "base": shown}, 200, seed=0)
    of_base = {cell.metric: cell for cell in cells if cell.policy == "base"}
    assert (of_base["w1_gravity"].mean, of_base["w1_gravity"].failed) == (pytest.approx(0.5), 5)
    assert (of_base["w1_gravity"].clips, of_base["w1_speed"].failed) == (40, 0)


def test_a_policy_that_never_shows_it_is_named_and_has_no_distance():
    nothing = {prompt: np.full((2, 3), math.nan) for prompt in PROMPTS}
    cells, comparisons, skipped = quantities.set_distances({"teacher": alike(5.0), "base": nothing}, 200, seed=0)
    assert {cell.policy for cell in cells} == {"teacher"}
    assert comparisons == []
    assert skipped == dict.fromkeys(quantities.METRICS, "in no video of base")


def test_the_teachers_floor_compares_its_even_takes_with_its_odd_ones():
    halves = {prompt: np.tile(np.array([[1.0], [4.0]]), (2, 3)) for prompt in PROMPTS}
    cells, _, _ = quantities.set_distances({"teacher": halves}, 200, seed=0)
    assert [cell.mean for cell in cells] == pytest.approx([3.0, 3.0, 3.0])
    one_take = {prompt: values[:1] for prompt, values in halves.items()}
    assert quantities.set_distances({"teacher": one_take}, 200, seed=0)[0] == []


def test_the_nearer_policy_wins_with_interval_and_swap_test_in_agreement():
    policies = {"teacher": drawn(0, 1), "ema": drawn(0.1, 2), "base": drawn(1.5, 3)}
    _, comparisons, _ = quantities.set_distances(policies, 1000, seed=0)
    for found in comparisons:
        assert found.hi is not None
        assert found.delta < found.hi < 0
        assert found.p == pytest.approx(1 / 1001)  # no swap of 20 prompts comes near


def test_policies_that_are_equal_cannot_be_told_apart():
    policies = {"teacher": drawn(0, 1), "ema": drawn(0, 2), "base": drawn(0, 2)}
    _, comparisons, _ = quantities.set_distances(policies, 300, seed=0)
    assert all((found.delta, found.p) == (0, 1) for found in comparisons)


def test_the_exact_swap_test_of_two_prompts_knows_four_patterns():
    teacher = {"a": np.zeros((1, 3)), "b": np.zeros((1, 3))}
    near, far = {key: value + 1 for key, value in teacher.items()}, {key: value + 2 for key, value in teacher.items()}
    _, (found, *_), _ = quantities.set_distances({"teacher": teacher, "ema": near, "base": far}, 200, seed=0)
    assert found.delta == -1
    assert found.p == 0.5  # both kept or both swapped reach |-1|; one swapped gives 1.5 - 1.5


def test_one_shared_prompt_is_not_enough():
    policies = {"teacher": alike(1.0), "base": {"p00": np.zeros((2, 3))}}
    reason = "needs two prompts that every policy has"
    assert quantities.set_distances(policies, 200, seed=0) == ([], [], dict.fromkeys(quantities.METRICS, reason))


def test_a_video_shows_the_speed_gravity_and_restitution_of_its_world():
    shown, truth = [], []
    for seed in range(12):
        frames, world = simulate(THROWN, seed, VideoConfig())
        shown.append(quantities.measured(physics.observe(frames, 8.0, THROWN)))
        body = world["bodies"][0]
        truth.append([np.hypot(*np.diff(body["positions"][:2], axis=0)[0]) * 8.0, 32.0, 0.92])
    error = np.abs(np.array(shown) - truth)
    assert np.nanmedian(error, axis=0) == pytest.approx([0, 0, 0], abs=0.5)
    assert np.nanmedian(error[:, 2]) < 0.03


def test_an_empty_video_shows_none_of_the_three():
    empty = np.full((12, 16, 16, 3), BACKGROUND[0], np.uint8)
    assert np.isnan(quantities.measured(physics.observe(empty, 8.0, THROWN))).all()


def test_motion_is_given_as_a_share_of_the_teachers():
    rows = [
        Row(policy, prompt, "", 0, "motion", value, 0)
        for policy, values in {"teacher": (2.0, 6.0), "base": (1.0, 2.0)}.items()
        for prompt, value in zip("ab", values, strict=True)
    ]
    found = {cell.policy: cell for cell in relative.cells(rows, 500, seed=0)}
    assert found["base"].mean == 3 / 8
    # Drawing only a gives 1/2, only b 1/3.
    assert (found["base"].lo, found["base"].hi) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert (found["teacher"].mean, found["teacher"].lo, found["teacher"].hi) == (1, 1, 1)
    assert relative.cells([row for row in rows if row.policy == "base"], 500, seed=0) == []


def test_a_trajectory_is_as_wrong_as_its_bodies_are_far_apart():
    teacher = np.zeros((1, 4, 2))
    aside = teacher + np.array([3.0, 4.0])
    assert trajectory_error(teacher, teacher, (24.0, 32.0)) == 0
    assert trajectory_error(aside, teacher, (24.0, 32.0)) == 5


def test_a_lost_body_and_a_far_one_count_half_the_rooms_diagonal():
    teacher = np.zeros((1, 4, 2))
    lost = teacher.copy()
    lost[0, 1] = math.nan
    lost[0, 2] = (24.0, 32.0)
    assert trajectory_error(lost, teacher, (24.0, 32.0)) == (20 + 20) / 4


def test_frames_in_which_the_teachers_body_is_not_found_are_left_out():
    teacher = np.zeros((1, 4, 2))
    teacher[0, :2] = math.nan
    assert trajectory_error(np.ones((1, 4, 2)), teacher, (24.0, 24.0)) == pytest.approx(math.sqrt(2))
    assert math.isnan(trajectory_error(np.ones((1, 4, 2)), np.full((1, 4, 2), math.nan), (24.0, 24.0)))
