"""Rates, places, Retry-After and backoff."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import pytest

from afd_data.teachers.traffic import Rate, Turnstile, backoff_s, retry_after_s

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
GO_ON = threading.Event()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        ("-3", 0.0),
        ("Mon, 23 Nov 2026 12:00:30 GMT", 30.0),
        ("Mon, 23 Nov 2026 13:00:30 +0100", 30.0),
        ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0),
        ("Mon, 23 Nov 2026 12:00:30", 30.0),
        ("soon", None),
        ("Mon, 99 Nov 2026 12:00:30 GMT", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, expected: float | None):
    assert retry_after_s(header, NOON) == expected


def test_backoff_doubles_and_keeps_within_its_limit():
    for attempt, highest in ((0, 0.5), (1, 1.0), (3, 4.0), (30, 10.0)):
        waits = [backoff_s(attempt, 10.0) for _ in range(50)]
        assert all(highest / 2 <= wait <= highest for wait in waits)
        assert len(set(waits)) > 1


def test_a_rate_of_1200_a_minute_lets_one_through_every_50_ms():
    rate, begin = Rate(1200), time.monotonic()
    assert all(rate.wait(GO_ON) for _ in range(4))
    assert 0.15 <= time.monotonic() - begin < 0.5


def test_no_rate_never_waits():
    rate, begin = Rate(None), time.monotonic()
    assert all(rate.wait(GO_ON) for _ in range(1000))
    assert time.monotonic() - begin < 0.5


def test_who_waits_is_told_to_stop_at_once():
    rate, stop, begin = Rate(1), threading.Event(), time.monotonic()
    assert rate.wait(stop)
    threading.Timer(0.05, stop.set).start()
    assert not rate.wait(stop)
    assert not Rate(None).wait(stop)
    assert time.monotonic() - begin < 1.0


def test_a_provider_that_wants_to_be_left_alone_is_left_alone_by_all_that_wait():
    rate, begin = Rate(1200), time.monotonic()
    passed: list[float] = []

    def wait() -> None:
        rate.wait(GO_ON)
        passed.append(time.monotonic() - begin)

    threads = [threading.Thread(target=wait) for _ in range(3)]  # their turns would be at 0, 50 and 100 ms
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    rate.hold_off(0.2)
    for thread in threads:
        thread.join()
    first, *others = sorted(passed)
    assert first < 0.05
    assert all(moment >= 0.2 for moment in others)
    assert others[1] - others[0] >= 0.04


def test_the_next_place_goes_to_the_one_that_expires_first():
    turnstile, order = Turnstile(1), []

    def stay(deadline: float) -> None:
        with turnstile.place(deadline):
            order.append(deadline)

    with turnstile.place(0.0):
        waiting = [threading.Thread(target=stay, args=(deadline,)) for deadline in (300.0, float("inf"), 100.0, 200.0)]
        for thread in waiting:
            thread.start()
            time.sleep(0.02)
        assert order == []
    for thread in waiting:
        thread.join()
    assert order == [100.0, 200.0, 300.0, float("inf")]


def test_no_more_than_the_places_are_taken_at_once():
    turnstile, inside, most = Turnstile(2), [], []

    def stay() -> None:
        with turnstile.place(1.0):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=stay) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 2


def test_a_place_is_given_back_after_an_error():
    turnstile = Turnstile(1)
    with pytest.raises(KeyError), turnstile.place(1.0):
        raise KeyError
    with turnstile.place(1.0):
        pass
