"""Distance to the teacher's videos as a set, on points whose distance is known."""

import math

import numpy as np
import pytest

from afd_train.evaluation import distribution as mmd

PROMPTS = [f"p{index:02d}" for index in range(24)]


def points(shift: float, seed: int, takes: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {prompt: generator.normal(shift, 1, (takes, 4)) for prompt in PROMPTS}


def test_two_point_masses_have_the_distance_of_their_kernel():
    # k(x, x) + k(y, y) - 2 k(x, y) = 2 - 2 exp(-1/2) for a distance of one width.
    here = {prompt: np.zeros((2, 1)) for prompt in PROMPTS}
    there = {prompt: np.ones((3, 1)) for prompt in PROMPTS}
    terms = mmd.pair_terms(here, there, PROMPTS, width=1.0)
    assert mmd.squared_mmd(terms) == pytest.approx(1000 * (2 - 2 * math.exp(-0.5)))


def test_equal_distributions_are_zero_apart_within_their_interval():
    terms = mmd.pair_terms(points(0, seed=1), points(0, seed=2), PROMPTS, width=2.0)
    lo, hi = mmd.bootstrap(terms, 2000, seed=0)
    assert lo < 0 < hi


def test_a_larger_shift_is_further_away():
    teacher = points(0, seed=1)
    found = [
        mmd.squared_mmd(mmd.pair_terms(points(shift, seed=2), teacher, PROMPTS, width=2.0)) for shift in (0, 0.5, 1)
    ]
    assert found[0] < found[1] < found[2]


def test_contributions_average_to_the_difference_of_the_two_distances():
    a, b, teacher = points(0.2, 1), points(0.6, 2), points(0, 3)
    difference = mmd.squared_mmd(mmd.pair_terms(a, teacher, PROMPTS, 2.0)) - mmd.squared_mmd(
        mmd.pair_terms(b, teacher, PROMPTS, 2.0)
    )
    assert mmd.swap_contributions(a, b, teacher, PROMPTS, 2.0).mean() == pytest.approx(difference)


def test_swapping_two_policies_on_some_prompts_flips_the_sign_of_those_contributions():
    a, b, teacher = points(0.2, 1), points(0.6, 2), points(0, 3)
    swapped = set(PROMPTS[::3])
    left = {prompt: (b if prompt in swapped else a)[prompt] for prompt in PROMPTS}
    right = {prompt: (a if prompt in swapped else b)[prompt] for prompt in PROMPTS}
    signs = np.array([-1 if prompt in swapped else 1 for prompt in PROMPTS])
    expected = (signs * mmd.swap_contributions(a, b, teacher, PROMPTS, 2.0)).mean()
    found = mmd.squared_mmd(mmd.pair_terms(left, teacher, PROMPTS, 2.0)) - mmd.squared_mmd(
        mmd.pair_terms(right, teacher, PROMPTS, 2.0)
    )
    assert found == pytest.approx(expected)


def test_the_nearer_policy_wins_with_interval_and_test_in_agreement():
    clips = {"teacher": points(0, 1), "ema": points(0.1, 2), "base": points(0.9, 3)}
    cells, (found,), skipped = mmd.compare_sets(clips, 2000, seed=0)
    assert not skipped
    assert found.delta < 0
    assert found.hi is not None
    assert found.hi < 0
    assert found.p < 0.01
    assert {cell.policy for cell in cells} == {"ema", "base", "teacher"}


def test_a_single_take_gives_the_teacher_no_floor():
    clips = {"teacher": points(0, 1, takes=1), "base": points(0, 2)}
    cells, comparisons, _ = mmd.compare_sets(clips, 200, seed=0)
    assert [cell.policy for cell in cells] == ["base"]
    assert comparisons == []


def test_one_shared_prompt_is_not_enough():
    clips = {"teacher": {"p": np.zeros((2, 3))}, "base": {"p": np.zeros((2, 3)), "q": np.zeros((1, 3))}}
    assert mmd.compare_sets(clips, 200, seed=0) == ([], [], {mmd.NAME: "needs two prompts that every policy has"})


def test_features_hold_small_frames_and_their_differences():
    video = np.zeros((4, 16, 16, 3), np.uint8)
    video[2:] = 255
    found = mmd.features(video)
    frames, steps = found[: 8 * 8 * 8 * 3].reshape(8, -1), found[8 * 8 * 8 * 3 :].reshape(7, -1)
    assert frames[0].tolist() == [0.0] * 192
    assert frames[-1].tolist() == [1.0] * 192
    assert steps.max(axis=1).tolist() == [0, 0, 0, 1, 0, 0, 0]
