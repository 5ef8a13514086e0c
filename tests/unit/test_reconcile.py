"""What follows from a provider's list of jobs, and what a person may have ordered again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.journal import JOURNAL, Journal
from afd_data.plan import Planned
from afd_data.reconcile import Reconciled, reconcile
from afd_data.resubmit import give_up, resubmit
from afd_data.status import status
from afd_data.teachers import (
    Delivery,
    FailedError,
    Identity,
    Job,
    LostError,
    Progress,
    RefusedError,
    Request,
    UnreachableError,
    order_token,
)

HOUR_S = 3600.0
DAYS = 24 * HOUR_S


class Listed:
    """A provider of which nothing is known but its list; `asked_since`: how far back it was asked for.

    hidden: what the first reading of the list leaves out.
    """

    identity = Identity("listed", "1", {}, paid=True)

    def __init__(self, *jobs: Job, oldest: float = 0.0, hidden: tuple[str, ...] = ()) -> None:
        self._jobs, self._oldest, self._hidden = jobs, oldest, hidden
        self.asked_since: list[float] = []

    def jobs(self, since: float) -> Iterator[Job]:
        if since < self._oldest:
            raise UserError("not that far back")
        self.asked_since.append(since)
        first = len(self.asked_since) == 1
        return (job for job in self._jobs if not (first and job.job_id in self._hidden))

    def prompts(self) -> list[str]:
        return []

    def estimate(self, video: VideoConfig) -> float:
        pytest.fail("only its list is asked for")

    def submit(self, request: Request) -> str:
        pytest.fail("only its list is asked for")

    def turn(self, stop: threading.Event) -> bool:
        pytest.fail("only its list is asked for")

    def poll(self, job_id: str) -> Progress:
        raise LostError("404")

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        pytest.fail("only its list is asked for")


class Polled:
    """A provider that lists nothing and answers questions for jobs as told."""

    identity = Identity("polled", "1", {}, paid=True)

    def __init__(self, **answers: Progress | Exception) -> None:
        self._answers = answers

    def prompts(self) -> list[str]:
        return []

    def estimate(self, video: VideoConfig) -> float:
        return 0.5

    def turn(self, stop: threading.Event) -> bool:
        return True

    def submit(self, request: Request) -> str:
        pytest.fail("nothing is ordered")

    def poll(self, job_id: str) -> Progress:
        answer = self._answers.get(job_id, LostError("404"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        pytest.fail("nothing is fetched")


class Shared:
    """A cache whose samples a test brings into the states that it wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        planned = [Planned(f"p{i:016x}-00", 0, "train", f"p{i:016x}", f"prompt {i}", 0, i, key(i)) for i in range(4)]
        with_journal(folder, lambda journal: journal.plan(planned))

    def attempt(self, number: int, *steps: tuple[str, dict], age_s: float = HOUR_S) -> None:
        """One order for sample `number`, that many seconds ago."""

        def write(journal: Journal) -> None:
            journal.move(number + 1, "intent", estimate=0.5, currency="USD")
            for state, columns in steps:
                journal.move(number + 1, state, **columns)
            journal.flush()
            journal._db.execute("UPDATE requests SET intent_at = ? WHERE id = (SELECT max(id) FROM requests)",
                                (time.time() - age_s,))  # fmt: skip

        with_journal(self.folder, write)

    def states(self) -> dict[str, int]:
        return with_journal(self.folder, lambda journal: journal.counts())

    def spend(self) -> tuple[float, float]:
        return with_journal(self.folder, lambda journal: journal.spend())["USD"]


UNKNOWN = ("unknown", {"reason": "no answer: x"})


def key(number: int) -> str:
    """A fingerprint."""
    return f"{number:x}" * 64


def with_journal(folder: Path, work: Callable):
    journal = Journal(folder / JOURNAL)
    try:
        return work(journal)
    finally:
        journal.close()


def job(number: int, job_id: str, age_s: float = HOUR_S) -> Job:
    return Job(job_id, order_token(key(number)), time.time() - age_s)


@pytest.fixture
def cache(tmp_path: Path) -> Shared:
    return Shared(tmp_path / "cache")


def test_a_listed_order_goes_on_with_its_job(cache: Shared):
    cache.attempt(0, UNKNOWN)
    assert len(reconcile(cache.folder, Listed(job(0, "job-a"))).found) == 1
    assert with_journal(cache.folder, lambda journal: journal.job_id(key(0))) == "job-a"
    assert cache.states() == {"planned": 3, "submitted": 1}


def test_of_two_jobs_of_one_order_the_first_is_taken(cache: Shared):
    cache.attempt(0, UNKNOWN)
    reconcile(cache.folder, Listed(job(0, "late", age_s=60), job(0, "early", age_s=120)))
    assert with_journal(cache.folder, lambda journal: journal.job_id(key(0))) == "early"


def test_an_absent_order_frees_what_was_reserved_for_it(cache: Shared):
    cache.attempt(0, UNKNOWN)
    assert cache.spend() == (0.0, 0.5)
    assert len(reconcile(cache.folder, Listed()).absent) == 1
    assert cache.spend() == (0.0, 0.0)
    assert cache.states() == {"planned": 3, "unknown": 1}


def test_the_job_of_an_attempt_that_ended_is_not_the_job_of_the_next(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "old"}), ("failed", {"cost": 0.5}))
    resubmit(cache.folder, states=("failed",), sure=True)
    cache.attempt(0, UNKNOWN)
    assert len(reconcile(cache.folder, Listed(job(0, "old"))).absent) == 1
    assert cache.spend() == (0.5, 0.0)


def test_a_lost_job_that_is_listed_again_goes_on(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN)
    assert len(reconcile(cache.folder, Listed(job(0, "a"))).found) == 1


def test_an_old_order_whose_job_is_known_does_not_keep_others_from_being_settled(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN, age_s=30 * DAYS)
    cache.attempt(1, UNKNOWN)
    done = reconcile(cache.folder, Listed(oldest=time.time() - 7 * DAYS))
    assert (len(done.open), len(done.absent)) == (1, 1)


def test_the_list_is_read_from_before_the_oldest_order(cache: Shared):
    cache.attempt(0, UNKNOWN, age_s=2 * HOUR_S)
    cache.attempt(1, UNKNOWN)
    reconcile(cache.folder, provider := Listed())
    assert provider.asked_since[0] == pytest.approx(time.time() - 2 * HOUR_S - 300, abs=30)


def test_a_young_order_is_neither_found_nor_absent(cache: Shared):
    cache.attempt(0, UNKNOWN, age_s=60)
    done = reconcile(cache.folder, Listed(), grace_s=900)
    assert len(done.young) == 1
    assert "less than 15 minutes ago" in done.text()
    assert resubmit(cache.folder, absent=True) == []


def test_a_job_that_one_reading_of_the_list_hides_is_not_called_absent(cache: Shared):
    cache.attempt(0, UNKNOWN)
    done = reconcile(cache.folder, Listed(job(0, "a"), hidden=("a",)))
    assert (len(done.found), done.absent) == (1, [])


@pytest.mark.parametrize("answer", [Progress("ready"), Progress("running"), FailedError("x"), RefusedError("x")])
def test_a_job_that_is_known_goes_on_where_the_provider_lists_nothing(cache: Shared, answer: Progress | Exception):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN)
    assert len(reconcile(cache.folder, Polled(a=answer)).found) == 1
    assert cache.states() == {"planned": 3, "submitted": 1}
    assert with_journal(cache.folder, lambda journal: journal.job_id(key(0))) == "a"


def test_a_job_that_is_lost_stays_open_where_the_provider_lists_nothing(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN)
    assert len(reconcile(cache.folder, Polled()).open) == 1


def test_a_provider_that_cannot_be_asked_leaves_the_order_unknown(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN)
    assert len(reconcile(cache.folder, Polled(a=UnreachableError("down"))).open) == 1
    assert cache.states() == {"planned": 3, "unknown": 1}


def test_jobs_that_are_known_go_on_although_other_orders_cannot_be_told_of(cache: Shared):
    cache.attempt(0, ("submitted", {"job_id": "a"}), UNKNOWN)
    cache.attempt(1, UNKNOWN)
    with pytest.raises(UserError, match=rf"(?s)1 found: .*p{0:016x}-00\n.*lists no jobs.*about 1 orders") as error:
        reconcile(cache.folder, Polled(a=Progress("ready")))
    assert "nothing is unknown" not in str(error.value)
    assert cache.states() == {"planned": 2, "submitted": 1, "unknown": 1}


def test_absent_orders_are_not_asked_about_twice(cache: Shared):
    cache.attempt(0, UNKNOWN)
    reconcile(cache.folder, Listed())
    reconcile(cache.folder, provider := Listed())
    assert provider.asked_since == []
    assert Reconciled().text() == "nothing is unknown"


def test_parts_are_settled_with_their_cache(cache: Shared):
    part = Shared(cache.folder / "parts" / "0000-of-0002")
    part.attempt(2, UNKNOWN)
    assert len(reconcile(cache.folder, Listed(job(2, "job-c"))).found) == 1
    assert part.states() == {"planned": 3, "submitted": 1}


def test_nothing_is_planned_in_any_part_when_one_order_may_be_charged_twice(cache: Shared):
    part = Shared(cache.folder / "parts" / "0000-of-0002")
    cache.attempt(0, ("refused", {"reason": "refused: x", "cost": 0.0}))
    part.attempt(1, UNKNOWN)
    with pytest.raises(UserError, match="may have been charged"):
        resubmit(cache.folder, states=("refused", "unknown"))
    assert cache.states() == {"planned": 3, "refused": 1}
    assert len(resubmit(cache.folder, states=("refused", "unknown"), sure=True)) == 2


@pytest.mark.parametrize(("cost", "refused"), [(0.0, False), (0.5, True)])
def test_a_failure_that_was_charged_is_ordered_again_only_when_sure(cache: Shared, cost: float, refused: bool):
    cache.attempt(0, ("submitted", {"job_id": "a"}), ("failed", {"cost": cost}))
    if refused:
        with pytest.raises(UserError, match="--yes"):
            resubmit(cache.folder, states=("failed",))
    assert len(resubmit(cache.folder, states=("failed",), sure=refused)) == 1


@pytest.mark.parametrize("state", ["rejected", "failed", "refused"])
def test_a_job_of_unknown_price_may_have_been_charged(cache: Shared, state: str):
    steps = [("submitted", {"job_id": "a", "estimate": 0.0}), *([("ready", {})] if state == "rejected" else [])]
    cache.attempt(0, *steps, (state, {"cost": None}))
    with pytest.raises(UserError, match="may have been charged"):
        resubmit(cache.folder, states=(state,))


@pytest.mark.parametrize("steps", [[], [("submitted", {"job_id": "a"})], [UNKNOWN]])
def test_what_is_given_up_is_no_open_question_and_its_money_stays_reserved(cache: Shared, steps: list):
    cache.attempt(0, *steps)
    cache.attempt(1, UNKNOWN)
    name = f"p{0:016x}-00"
    assert give_up(cache.folder, [name]) == [name]
    assert cache.states() == {"planned": 2, "unknown": 2}
    assert cache.spend() == (0.0, 1.0)
    assert "1 x unknown (given up)" in status(cache.folder)
    assert len(reconcile(cache.folder, Listed(job(0, "a"), job(1, "b"))).found) == 1
    with pytest.raises(UserError, match="may have been charged"):
        resubmit(cache.folder, keys=[name])


def test_what_is_not_under_way_cannot_be_given_up(cache: Shared):
    cache.attempt(0, UNKNOWN)
    with pytest.raises(UserError, match=f"is called p{1:016x}-00.*Nothing was changed"):
        give_up(cache.folder, [f"p{0:016x}-00", f"p{1:016x}-00"])
    assert "given up" not in status(cache.folder)


def test_status_lists_every_unknown_order_however_many_others_there_are(cache: Shared):
    for number in range(3):
        cache.attempt(number, UNKNOWN)
    said = status(cache.folder)
    assert all(f"p{number:016x}-00" in said for number in range(3))
    assert "spent: 0.00 USD, 1.50 more reserved" in said
