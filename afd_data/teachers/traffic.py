"""How much at a time, and how long to wait: rates, places, Retry-After, backoff.  Knows nothing of HTTP clients."""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count

FIRST_BACKOFF_S = 0.5


class Rate:
    """Lets at most `per_minute` through in a minute, evenly; None: all.  Thread-safe."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0  # time.monotonic() of the next free slot
        self._not_before = 0.0  # time.monotonic() until which the provider wants to be left alone

    def wait(self, stop: threading.Event) -> bool:
        """Return True when it is this caller's turn, False when told to stop."""
        turn = self._slot()
        while (left_s := turn - time.monotonic()) > 0:
            if stop.wait(left_s):
                return False
            if turn < self._not_before:
                turn = self._slot()
        return not stop.is_set()

    def hold_off(self, seconds: float) -> None:
        """Let nobody through for so long, also of those who wait already."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)
            self._next = max(self._next, self._not_before)

    def _slot(self) -> float:
        with self._lock:
            slot = max(self._next, time.monotonic())
            self._next = slot + self._gap_s
            return slot


class Turnstile:
    """A bounded number of places; of those who wait, the most urgent gets the next.  Thread-safe."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int]] = []
        self._numbers = count()

    @contextmanager
    def place(self, deadline: float) -> Iterator[None]:
        """Hold a place; deadline: seconds since 1970, earliest first."""
        ticket = (deadline, next(self._numbers))
        with self._changed:
            heapq.heappush(self._waiting, ticket)
            try:
                self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] == ticket)
                self._free -= 1
            finally:  # also when interrupted, or those behind would wait for ever
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


def backoff_s(attempt: int, longest_s: float) -> float:
    """Seconds to wait after try number `attempt` (from 0): doubling, with jitter, so that clients spread."""
    highest = min(longest_s, FIRST_BACKOFF_S * 2**attempt)
    return random.uniform(highest / 2, highest)


def retry_after_s(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, a number or a date; None: none, or not readable."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    moment = datetime.now(UTC).timestamp() if now is None else now
    return max(0.0, when.timestamp() - moment)
