"""Reconciling and ordering again where a cache has had several rounds, or several settings of its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd_data.journal import Journal
from afd_data.reconcile import reconcile
from afd_data.resubmit import resubmit
from tests.unit.test_reconcile import UNKNOWN, Listed, Shared, job, key, with_journal

FACTS = {"teacher": "listed", "teacher_version": "1", "settings": {}}


@pytest.fixture
def cache(tmp_path: Path) -> Shared:
    """One order of which nothing is known."""
    cache = Shared(tmp_path / "cache")
    cache.attempt(0, UNKNOWN)
    return cache


def begin(cache: Shared, generation: int, **facts: object) -> None:
    with_journal(cache.folder, lambda journal: journal.start_round(generation, FACTS | facts, {}))


@pytest.mark.parametrize("other", [{"teacher": "another"}, {"teacher_version": "2"}, {"settings": {"model": "b"}}])
def test_a_job_of_another_teacher_or_setting_is_not_taken_for_this_ones(cache: Shared, other: dict) -> None:
    begin(cache, 0, **other)
    done = reconcile(cache.folder, Listed(job(0, "job-a")))
    assert (len(done.open), done.found, done.absent) == (1, [], [])
    assert cache.states() == {"planned": 3, "unknown": 1}


def test_a_job_of_the_same_teacher_goes_on(cache: Shared) -> None:
    begin(cache, 0)
    begin(cache, 1, settings={"model": "b"})
    assert len(reconcile(cache.folder, Listed(job(0, "job-a"))).found) == 1


def test_an_order_of_an_older_round_is_left_to_a_refresh(cache: Shared, caplog: pytest.LogCaptureFixture) -> None:
    begin(cache, 0)
    begin(cache, 1)
    assert resubmit(cache.folder, states=("unknown",), sure=True) == []
    assert "--refresh" in caplog.text
    assert cache.states() == {"planned": 3, "unknown": 1}


def test_an_order_that_is_left_to_a_refresh_is_settled(cache: Shared) -> None:
    begin(cache, 0)
    begin(cache, 1)
    reconcile(cache.folder, Listed())
    assert resubmit(cache.folder, absent=True) == []
    reconcile(cache.folder, provider := Listed(job(0, "late")))
    assert provider.asked_since == []

    def reasons(journal: Journal) -> list[str]:
        return [row.reason for row in journal.rows(states=("unknown",)) if row.fingerprint == key(0)]

    (reason,) = with_journal(cache.folder, reasons)
    assert reason.startswith("again: absent: ")
