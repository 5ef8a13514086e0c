"""What becomes of samples when their teacher dawdles, charges, forgets, or delivers what nobody can use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afd_data.acceptance import RejectedError
from afd_data.cache import cache_teacher
from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.journal import JOURNAL, Journal, open_journal
from afd_data.prompts import Prompt
from afd_data.teachers import (
    Delivery,
    FailedError,
    Identity,
    LostError,
    Progress,
    RefusedError,
    Request,
    UnreachableError,
)
from afd_data.video import write_mp4
from tests.provider.footage import draw

VIDEO = VideoConfig(width=32, height=32, frames=8, fps=8.0)
HOUR_S = 3600.0


class Seller:
    """A paid teacher whose steps a test replaces; remembers the prompts of its orders."""

    def __init__(self, price: float = 1.0, paid: bool = True, currency: str = "USD", **steps: Callable) -> None:
        self.identity = Identity("seller", "1", {}, paid=paid, currency=currency)
        self.orders: list[str] = []
        self._price, self._steps = price, steps

    def prompts(self) -> list[str]:
        return []

    def estimate(self, video: VideoConfig) -> float:
        return self._price

    def turn(self, stop: threading.Event) -> bool:
        return self._steps["turn"](stop) if "turn" in self._steps else True

    def submit(self, request: Request) -> str:
        self.orders.append(request.prompt)
        return self._steps["submit"](request) if "submit" in self._steps else f"job-{request.fingerprint[:8]}"

    def poll(self, job_id: str) -> Progress:
        return self._steps["poll"](job_id) if "poll" in self._steps else Progress("ready")

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        found = self._steps["fetch"](request) if "fetch" in self._steps else None
        write_mp4(target, draw(request.prompt, request.seed, request.video), request.video)
        return found or Delivery(cost=self._price)


def raising(error: Exception) -> Callable:
    def step(_: object) -> Any:
        raise error

    return step


class Shelf:
    """A cache of `count` videos in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, teacher: Seller, count: int = 1, **cache: Any) -> None:
        recipe = DataConfig(
            out="unused",
            video=VIDEO,
            prompts=PromptsConfig(source="unused.txt"),
            teacher=PlaygroundConfig(),
            cache=CacheConfig(**({"workers": 1, "poll_s": 0.01} | cache)),
        )
        prompts = [Prompt(f"p{i:016x}", f"prompt {i}", "train") for i in range(count)]
        cache_teacher(recipe, prompts, self.folder, teacher, progress=False)

    def select(self, query: str) -> list[tuple]:
        journal = open_journal(self.folder)
        try:
            return journal.select(query)
        finally:
            journal.close()

    def states(self) -> dict[str, int]:
        return dict(self.select("SELECT state, count(*) FROM samples GROUP BY state"))

    def reasons(self) -> list[str]:
        return [reason for (reason,) in self.select("SELECT reason FROM samples ORDER BY id")]

    def costs(self) -> list[float | None]:
        return [cost for (cost,) in self.select("SELECT cost FROM requests ORDER BY id")]

    def age(self, hours: float) -> None:
        """Make all jobs that much older."""
        journal = Journal(self.folder / JOURNAL)
        journal.select("UPDATE requests SET submitted_at = submitted_at - ?", (hours * HOUR_S,))
        journal.close()

    def spooled(self, ending: str) -> Path:
        (path,) = (self.folder / "spool").glob(f"g????-*.{ending}")
        return path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "cache")


# Turns


def test_nothing_is_written_down_while_an_order_waits_for_its_turn(shelf: Shelf):
    seen = []

    def turn(stop: threading.Event) -> bool:
        seen.append((shelf.states(), shelf.costs()))
        return True

    shelf.run(Seller(turn=turn))
    assert seen == [({"planned": 1}, [])]


def test_an_order_that_is_told_to_stop_at_its_turn_is_still_planned(shelf: Shelf):
    teacher = Seller(turn=lambda stop: False)
    shelf.run(teacher, 3)
    assert (teacher.orders, shelf.states()) == ([], {"planned": 3})


def test_orders_that_wait_for_their_turn_learn_that_too_many_have_failed(shelf: Shelf):
    turns = [True]

    def turn(stop: threading.Event) -> bool:
        if turns:
            return turns.pop()
        assert stop.wait(10), "nobody told"
        return False

    teacher = Seller(turn=turn, submit=raising(FailedError("no")))
    with pytest.raises(UserError, match="1 requests failed"):
        shelf.run(teacher, 4, workers=2, stop_after_failures=1)
    assert len(teacher.orders) == 1


def test_an_order_broken_off_before_it_was_sent_is_planned_again(shelf: Shelf):
    def submit(request: Request) -> str:
        if request.prompt == "prompt 0":
            raise FailedError("no GPU")
        time.sleep(0.3)
        raise FailedError("stopped before it was ordered")

    with pytest.raises(UserError, match="1 requests failed"):
        shelf.run(Seller(submit=submit), 2, workers=2, stop_after_failures=1)
    assert shelf.states() == {"failed": 1, "planned": 1}


# Failures one after the other


def test_rejected_videos_that_are_paid_for_stop_the_run(shelf: Shelf):
    teacher = Seller(fetch=raising(RejectedError("too short: 1 s")))
    with pytest.raises(UserError, match="3 requests failed one after the other, the last with: too short"):
        shelf.run(teacher, 40, stop_after_failures=3)
    assert len(teacher.orders) == 3


def test_rejected_videos_of_a_free_teacher_do_not_stop_the_run(shelf: Shelf):
    shelf.run(Seller(0.0, paid=False, fetch=raising(RejectedError("too short: 1 s"))), 5, stop_after_failures=3)
    assert shelf.states() == {"rejected": 5}


def test_a_late_success_does_not_take_back_that_too_many_have_failed(shelf: Shelf):
    def submit(request: Request) -> str:
        if request.prompt == "prompt 0":
            return "slow"
        raise FailedError("no")

    def poll(job_id: str) -> Progress:
        time.sleep(0.5)
        return Progress("ready")

    with pytest.raises(UserError, match="3 requests failed one after the other"):
        shelf.run(Seller(submit=submit, poll=poll), 8, workers=2, stop_after_failures=3)
    assert shelf.states() == {"sealed": 1, "failed": 3, "planned": 4}


# Money


def test_a_limit_without_a_price_is_refused_before_anything_is_ordered(shelf: Shelf):
    teacher = Seller(price=0.0)
    with pytest.raises(UserError, match=r"max_cost=5 cannot be kept.*teacher\.price"):
        shelf.run(teacher, max_cost=5)
    assert teacher.orders == []


def test_a_limit_in_another_currency_than_was_spent_is_refused(shelf: Shelf):
    shelf.run(Seller(currency="EUR"))
    with pytest.raises(UserError, match="it is in USD, and this cache has spent EUR"):
        shelf.run(Seller(currency="USD"), 2, max_cost=5)


def test_a_video_that_was_dearer_than_estimated_raises_what_the_next_reserves(shelf: Shelf):
    def dear(request: Request) -> Delivery:
        return Delivery(cost=2.0)

    teacher = Seller(fetch=dear)
    with pytest.raises(UserError, match=r"4\.00 are spent or reserved, and the next request \(about 2\.00\)"):
        shelf.run(teacher, 9, workers=1, max_cost=5.5)  # 1 is reserved for each of the first two
    assert len(teacher.orders) == 2
    with pytest.raises(UserError, match=r"about 2\.00"):
        shelf.run(teacher, 9, workers=1, max_cost=5.5)
    assert len(teacher.orders) == 2


@pytest.mark.parametrize("error", [FailedError("x", cost=None), RefusedError("x", cost=None)])
def test_a_failure_that_was_charged_without_a_price_costs_what_was_estimated(shelf: Shelf, error: Exception):
    shelf.run(Seller(poll=raising(error)), stop_after_failures=9)
    assert shelf.costs() == [1.0]


@pytest.mark.parametrize(("told", "booked"), [(0.25, 0.25), (None, 1.0)])
def test_a_rejected_video_costs_what_the_provider_tells_else_the_estimate(
    shelf: Shelf, told: float | None, booked: float
):
    shelf.run(Seller(fetch=raising(RejectedError("too short: 1 s", told))))
    assert shelf.costs() == [booked]


def test_what_nobody_knows_the_price_of_is_booked_as_not_known(shelf: Shelf):
    shelf.run(Seller(0.0, fetch=raising(RejectedError("too short: 1 s"))))
    assert shelf.costs() == [None]


# Jobs that never end


def forever(job_id: str) -> Progress:
    return Progress("running")


def unreachable_once(shelf: Shelf, teacher: Seller, **cache: Any) -> None:
    """One job is ordered and cannot be asked about."""
    teacher._steps["poll"] = raising(UnreachableError("down"))
    shelf.run(teacher, **cache)
    assert shelf.states() == {"submitted": 1}


@pytest.mark.parametrize(("paid", "state", "cost"), [(True, "unknown", None), (False, "failed", 0.0)])
@pytest.mark.parametrize("poll", [forever, raising(UnreachableError("down"))])
def test_a_job_of_which_nothing_came_for_too_long_is_given_up(
    shelf: Shelf, paid: bool, state: str, cost: float | None, poll: Callable
):
    unreachable_once(shelf, Seller(float(paid), paid))
    shelf.age(hours=2.1)
    shelf.run(Seller(float(paid), paid, poll=poll), longest_job_hours=2.0)
    assert (shelf.states(), shelf.costs()) == ({state: 1}, [cost])
    assert shelf.reasons()[0].startswith("overdue: ")


def test_an_old_job_that_is_ready_at_last_is_fetched(shelf: Shelf):
    unreachable_once(shelf, Seller())
    shelf.age(hours=100)
    shelf.run(Seller())
    assert shelf.states() == {"sealed": 1}


# The spool


def left_in_spool(shelf: Shelf) -> None:
    """One paid video is spooled behind a job that goes on, and so not sealed."""

    def poll(job_id: str) -> Progress:
        if job_id == "first":
            raise UnreachableError("down")
        return Progress("ready")

    teacher = Seller(submit=lambda request: "first" if request.prompt == "prompt 0" else "second", poll=poll)
    shelf.run(teacher, 2)
    assert shelf.states() == {"submitted": 1, "spooled": 1}


def lose_video(shelf: Shelf) -> None:
    shelf.spooled("mp4").unlink()


def lose_record(shelf: Shelf) -> None:
    shelf.spooled("json").unlink()


def damage_video(shelf: Shelf) -> None:
    path = shelf.spooled("mp4")
    path.write_bytes(b"x" + path.read_bytes()[1:])


def damage_record(shelf: Shelf) -> None:
    shelf.spooled("json").write_text("{")


@pytest.mark.parametrize("harm", [lose_video, lose_record, damage_video, damage_record])
def test_a_paid_video_lost_from_the_spool_is_noted_with_its_cost_and_the_run_goes_on(
    shelf: Shelf, harm: Callable, caplog: pytest.LogCaptureFixture
):
    left_in_spool(shelf)
    harm(shelf)
    shelf.run(Seller(), 2)
    assert shelf.states() == {"sealed": 1, "rejected": 1}
    assert shelf.reasons()[1].startswith("lost from the spool: ")
    assert shelf.costs() == [1.0, 1.0]
    assert "was paid for and spooled" in caplog.text


def bare(shelf: Shelf) -> bytes:
    """A run died between the video's name and its record."""
    left_in_spool(shelf)
    video = shelf.spooled("mp4").read_bytes()
    shelf.spooled("json").unlink()
    journal = Journal(shelf.folder / JOURNAL)
    journal.select("UPDATE samples SET state = 'ready' WHERE state = 'spooled'")
    journal.select("UPDATE requests SET state = 'ready', cost = NULL WHERE job_id = 'second'")
    journal.close()
    return video


@pytest.mark.parametrize("step", ["poll", "fetch"])
def test_a_video_that_the_provider_has_no_more_is_taken_from_the_spool(shelf: Shelf, step: str):
    bare(shelf)
    if step == "poll":
        journal = Journal(shelf.folder / JOURNAL)
        journal.select("UPDATE samples SET state = 'running' WHERE state = 'ready'")
        journal.close()
    lost = raising(LostError("404"))
    shelf.run(Seller(poll=lost) if step == "poll" else Seller(fetch=lost), 2)
    assert shelf.states() == {"unknown": 1, "sealed": 1}


def test_a_bare_video_is_fetched_again_where_the_provider_has_it(shelf: Shelf):
    bare(shelf)
    shelf.run(Seller(), 2)
    assert shelf.states() == {"sealed": 2}
    assert list((shelf.folder / "spool").iterdir()) == []


def test_a_bare_video_that_nobody_waits_for_is_removed(shelf: Shelf):
    bare(shelf)
    journal = Journal(shelf.folder / JOURNAL)
    journal.select("UPDATE samples SET state = 'unknown' WHERE state = 'ready'")
    journal.close()
    shelf.run(Seller(), 2)
    assert list((shelf.folder / "spool").iterdir()) == []


# Reasons, cards


def test_a_reason_names_no_place_of_this_machine(shelf: Shelf):
    spool = shelf.folder / "spool"
    shelf.run(Seller(fetch=raising(RejectedError(f"undecodable: {spool}/a.part.mp4: no video"))))
    assert shelf.reasons() == ["undecodable: a.part.mp4: no video"]


def test_card_and_picture_are_drawn_again_only_when_the_data_changed(shelf: Shelf):
    shelf.run(Seller())
    sheet = shelf.folder / "contact-sheet.png"
    before = sheet.stat().st_mtime_ns
    shelf.run(Seller())
    assert sheet.stat().st_mtime_ns == before
    shelf.run(Seller(), 2)
    assert sheet.stat().st_mtime_ns > before
    sheet.unlink()
    shelf.run(Seller(), 2)
    assert sheet.exists()
