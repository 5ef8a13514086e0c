"""How much may still be asked for, and how many failures are too many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from afd_data.budget import Budget, Streak


def test_without_a_limit_everything_fits():
    budget = Budget(None)
    assert all(budget.reserve(1e9) for _ in range(3))


def test_what_is_reserved_counts_before_it_is_charged():
    budget = Budget(1.0)
    assert [budget.reserve(0.4) for _ in range(3)] == [True, True, False]


def test_what_was_spent_before_counts():
    assert not Budget(1.0, spent=0.7).reserve(0.4)
    assert Budget(1.0, spent=0.5).reserve(0.4)


def test_the_limit_itself_may_be_reached_in_whatever_steps():
    budget = Budget(0.3)  # 3 x 0.1 is more than 0.3 in binary
    assert all(budget.reserve(0.1) for _ in range(3))
    assert not budget.reserve(0.001)


def test_a_request_that_turned_out_cheaper_makes_room():
    budget = Budget(1.0)
    assert budget.reserve(0.6)
    assert not budget.reserve(0.6)
    budget.settle(0.6, charged=0.2)
    assert budget.spent == pytest.approx(0.2)
    assert budget.reserve(0.6)


def test_a_request_that_turned_out_dearer_takes_room():
    budget = Budget(1.0)
    budget.reserve(0.3)
    budget.settle(0.3, charged=0.8)
    assert not budget.reserve(0.3)


def test_a_limit_of_nothing_lets_only_free_requests_through():
    budget = Budget(0.0)
    assert budget.reserve(0.0)
    assert not budget.reserve(0.01)


def test_threads_together_reserve_no_more_than_the_limit():
    budget = Budget(50.0)
    with ThreadPoolExecutor(16) as pool:
        granted = sum(pool.map(lambda _: budget.reserve(1.0), range(200)))
    assert granted == 50


def test_a_streak_breaks_at_its_limit_and_remembers_the_last_reason():
    streak = Streak(3)
    for reason in ("one", "two"):
        streak.failed(reason)
    assert not streak.broken
    streak.failed("three")
    assert streak.broken
    assert streak.last == "three"


def test_a_success_starts_the_streak_anew():
    streak = Streak(2)
    streak.failed("one")
    streak.succeeded()
    streak.failed("two")
    assert not streak.broken
