"""How much may still be asked for, and how many failures are too many."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from afd_data.budget import Budget, Streak, highest_cost
from afd_data.journal import Journal
from afd_data.plan import Planned


def test_without_a_limit_everything_fits():
    budget = Budget(None, price=1e9)
    assert all(budget.reserve() for _ in range(3))


def test_what_is_reserved_counts_before_it_is_charged():
    budget = Budget(1.0, price=0.4)
    assert [budget.reserve() for _ in range(3)] == [True, True, False]


def test_what_was_spent_before_counts():
    assert not Budget(1.0, spent=0.7, price=0.4).reserve()
    assert Budget(1.0, spent=0.5, price=0.4).reserve()


def test_the_limit_itself_may_be_reached_in_whatever_steps():
    budget = Budget(0.3, price=0.1)  # 3 x 0.1 is more than 0.3 in binary
    assert [budget.reserve() for _ in range(4)] == [True, True, True, False]


def test_a_request_that_turned_out_cheaper_makes_room():
    budget = Budget(1.0, price=0.6)
    assert budget.reserve()
    assert not budget.reserve()
    budget.settle(0.2)
    assert budget.spent == pytest.approx(0.2)
    assert budget.reserve()


def test_a_request_that_turned_out_dearer_takes_room():
    budget = Budget(1.0, price=0.3)
    budget.reserve()
    budget.settle(0.8)
    assert not budget.reserve()


def test_once_a_request_was_dearer_that_is_reserved_for_all_under_way():
    budget = Budget(10.0, price=1.0)
    assert all(budget.reserve() for _ in range(4))
    budget.settle(2.5)
    assert budget.spent == 2.5 + 3 * 2.5
    assert not budget.reserve()


def test_a_request_from_before_replaces_its_own_estimate():
    budget = Budget(10.0, spent=3.0, price=1.0)
    budget.correct(estimate=1.0, charged=0.5)
    assert (budget.spent, budget.price) == (2.5, 1.0)


def test_a_limit_of_nothing_lets_only_free_requests_through():
    assert Budget(0.0).reserve()
    assert not Budget(0.0, price=0.01).reserve()


def test_threads_together_reserve_no_more_than_the_limit():
    budget = Budget(50.0, price=1.0)
    with ThreadPoolExecutor(16) as pool:
        granted = sum(pool.map(lambda _: budget.reserve(), range(200)))
    assert granted == 50


def test_the_price_follows_from_what_the_newest_round_cost_in_that_currency(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    assert highest_cost(journal, "USD") == 0.0
    rounds = [[("USD", 5.0)], [("USD", 1.0), ("USD", 2.0), ("EUR", 9.0)]]  # the first one's teacher was dearer
    for generation, charges in enumerate(rounds):
        names = [f"{generation}-{number}" for number in range(len(charges))]
        samples = [Planned(name, generation, "train", "p1", "a ball", 0, 1, name) for name in names]
        journal.start_round(generation, {}, {}, samples)
        for row, (currency, cost) in zip(list(journal.rows(states=("planned",))), charges, strict=True):
            journal.move(row.id, "intent", estimate=0.5, currency=currency)
            journal.move(row.id, "refused", cost=cost)
    assert (highest_cost(journal, "USD"), highest_cost(journal, "EUR")) == (2.0, 9.0)
    journal.close()


def test_a_streak_breaks_at_its_limit_and_remembers_the_last_reason():
    streak = Streak(3)
    for reason in ("one", "two"):
        streak.failed(reason)
    assert not streak.broken
    streak.failed("three")
    assert streak.broken
    assert streak.last == "three"


def test_a_streak_that_broke_stays_broken_with_its_reason():
    streak = Streak(1)
    streak.failed("one")
    streak.failed("two")
    streak.succeeded()
    assert (streak.broken, streak.last) == (True, "one")


def test_a_success_starts_the_streak_anew():
    streak = Streak(2)
    streak.failed("one")
    streak.succeeded()
    streak.failed("two")
    assert not streak.broken
