"""Statistics against numbers derived by hand and against scipy as an oracle."""

import math

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_rel

from afd_train.evaluation import stats


def test_clips_are_averaged_within_their_prompt_first():
    means = stats.unit_means(["b", "a", "b", "b"], np.array([0.0, 7.0, 3.0, 6.0]))
    assert means == {"a": 7.0, "b": 3.0}


def test_a_failed_clip_counts_as_the_worst_clip_of_any_policy():
    seen = np.array([0.2, np.nan, 0.9, 0.5])
    values = np.array([np.nan, 0.9])
    assert stats.failures_as_worst(values, "higher", seen).tolist() == [0.2, 0.9]
    assert stats.failures_as_worst(values, "lower", seen).tolist() == [0.9, 0.9]


def test_a_metric_without_any_measured_clip_has_no_worst_value():
    with pytest.raises(ValueError, match="no clip could be measured"):
        stats.failures_as_worst(np.array([np.nan]), "higher", np.array([np.nan]))


def test_the_interval_of_equal_values_is_that_value():
    assert stats.bootstrap_interval(np.full(5, 0.25), 1000, seed=0) == stats.Interval(0.25, 0.25, 0.25, 5)


def test_one_prompt_has_a_mean_but_no_interval():
    interval = stats.bootstrap_interval(np.array([3.0]), 1000, seed=0)
    assert interval.mean == 3.0
    assert math.isnan(interval.lo)
    assert math.isnan(interval.hi)


def test_the_interval_approaches_the_normal_one_for_many_symmetric_values():
    values = np.tile([-1.0, 1.0], 200)  # standard error 1 / sqrt(400) = 0.05
    interval = stats.bootstrap_interval(values, 10_000, seed=1)
    assert interval.lo == pytest.approx(-1.96 * 0.05, abs=0.006)
    assert interval.hi == pytest.approx(1.96 * 0.05, abs=0.006)


def test_the_interval_follows_from_the_seed():
    values = np.random.default_rng(0).random(20)
    assert stats.bootstrap_interval(values, 500, seed=3) == stats.bootstrap_interval(values, 500, seed=3)


def test_three_equal_differences_give_an_exact_p_of_one_quarter():
    # Of the 8 sign patterns only +++ and --- reach the observed sum.
    assert stats.sign_flip_p(np.array([2.0, 2.0, 2.0]), 1000, seed=0) == 0.25


def test_no_difference_gives_p_one():
    assert stats.sign_flip_p(np.zeros(4), 1000, seed=0) == 1.0
    assert stats.sign_flip_p(np.zeros(40), 1000, seed=0) == 1.0


def test_the_exact_sign_flip_agrees_with_scipy():
    differences = np.random.default_rng(5).normal(0.4, 1, 10)
    oracle = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=2**10).pvalue
    assert stats.sign_flip_p(differences, 1000, seed=0) == pytest.approx(oracle)


def test_the_sampled_sign_flip_agrees_with_the_normal_approximation_and_is_never_zero():
    # 100 differences of size 1 with sum 20: z = 20 / sqrt(100) = 2; the lattice's two tails sum to 0.0569.
    differences = np.array([1.0] * 60 + [-1.0] * 40)
    assert stats.sign_flip_p(differences, 20_000, seed=0) == pytest.approx(0.0569, abs=0.006)
    assert stats.sign_flip_p(np.ones(64), 999, seed=0) == pytest.approx(1 / 1000)


def test_holm_multiplies_by_the_hypotheses_left_and_never_falls():
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_wilson_gives_the_interval_of_57_in_72():
    lo, hi = stats.wilson(57, 72)
    assert lo == pytest.approx(0.684, abs=5e-4)
    assert hi == pytest.approx(0.869, abs=5e-4)


def test_wilson_of_no_success_starts_at_zero_and_does_not_end_there():
    # hi = z^2 / (n + z^2) for 0 of n.
    lo, hi = stats.wilson(0, 10)
    assert lo == 0.0
    assert hi == pytest.approx(3.8415 / 13.8415, abs=1e-4)


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="11 of 10"):
        stats.wilson(11, 10)


def test_a_ratio_of_means_is_not_a_mean_of_ratios():
    interval = stats.ratio_interval(np.array([1.0, 2.0]), np.array([2.0, 8.0]), 500, seed=0)
    assert interval.mean == 0.3
    assert (interval.lo, interval.hi) == (0.25, 0.5)  # both draws the second prompt, or the first
    with pytest.raises(ValueError, match="positive mean"):
        stats.ratio_interval(np.ones(2), np.zeros(2), 500, seed=0)


def test_students_interval_of_three_seeds():
    # sd 1, t_{2, .975} = 4.30265: 2 +- 4.30265 / sqrt(3).
    interval = stats.t_interval(np.array([1.0, 2.0, 3.0]))
    assert (interval.mean, interval.n) == (2.0, 3)
    assert interval.hi - 2 == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert 2 - interval.lo == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)


def test_one_seed_has_a_mean_but_no_interval():
    interval = stats.t_interval(np.array([3.0]))
    assert interval.mean == 3.0
    assert math.isnan(interval.lo)


def test_the_paired_t_test_of_two_seeds_is_cauchys():
    # t = mean / (sd / sqrt(2)) = 2 / (sqrt(2) / sqrt(2)) = 2; with one degree of freedom p = 1 - 2 atan(2) / pi.
    assert stats.paired_t_p(np.array([1.0, 3.0])) == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_the_paired_t_test_agrees_with_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    assert stats.paired_t_p(a - b) == pytest.approx(ttest_rel(a, b).pvalue)


def test_equal_differences_leave_nothing_to_judge_by():
    assert stats.paired_t_p(np.full(3, 0.1 + 0.2)) == 1
    assert stats.paired_t_p(np.zeros(3)) == 1
    with pytest.raises(ValueError, match="two pairs"):
        stats.paired_t_p(np.ones(1))
