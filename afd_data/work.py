"""Worker threads carry samples through a teacher while the main thread seals: bounded, interruptible, in budget."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from afd_data.asking import Asker
from afd_data.errors import UserError
from afd_data.journal import Journal, Row
from afd_data.progress import progress_bar
from afd_data.sealing import Sealer
from afd_data.states import OPEN
from afd_data.teachers import programs

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 0.25  # records of a free teacher wait this long at most; what a crash loses is asked again
INTERRUPTED = 130  # exit code of a shell's Ctrl-C


def ask_all(asker: Asker, journal: Journal, sealer: Sealer, workers: int, progress: bool) -> None:
    """Carry everything that is pending to its end, sealing what is decided on the way.

    Raises UserError (the teacher takes no orders, too many failures one after the other, no money left), and
    KeyboardInterrupt after a clean stop on Ctrl-C.
    """
    work = _Work(asker, journal.pending(), 2 * workers)
    total = sum(count for state, count in journal.counts().items() if state in OPEN)
    if not total:
        log.info("nothing to ask for: every sample has come to an end")
    bar = progress_bar(total, "video", "cache-teacher", disable=not (progress and total), smoothing=0.05)
    with bar, _stop_on_interrupt(asker, bar.write), ThreadPoolExecutor(workers, "teacher") as pool:
        try:
            while work.hand_out(pool):
                done, work.in_flight = wait(work.in_flight, timeout=COMMIT_EVERY_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(len(done))
                sealer.advance()
                if not done:
                    journal.flush()
        except BaseException:
            asker.halt()
            raise
    journal.flush()
    if asker.stop.is_set():
        raise KeyboardInterrupt("stopped; the same command goes on from here")
    sealer.advance()
    work.explain_stop()


class _Work:
    """What is pending, handed out in order as long as it may be."""

    def __init__(self, asker: Asker, pending: Iterator[Row], limit: int) -> None:
        self.in_flight: set[Future] = set()
        self._asker = asker
        self._pending = pending
        self._limit = limit
        self._next: Row | None = next(pending, None)

    def hand_out(self, pool: ThreadPoolExecutor) -> bool:
        """Fill up; whether anything is in flight now."""
        asker = self._asker
        while self._next is not None and len(self.in_flight) < self._limit:
            if asker.stop.is_set() or asker.streak.broken:
                break
            if self._next.state == "planned" and not asker.budget.reserve():
                break  # what is in flight may turn out cheaper than reserved
            self.in_flight.add(pool.submit(asker.ask, self._next))
            self._next = next(self._pending, None)
        return bool(self.in_flight)

    def explain_stop(self) -> None:
        """Raises UserError when there was more to do."""
        asker = self._asker
        if asker.streak.broken:
            raise UserError(
                f"stopped: {asker.streak.limit} requests failed one after the other, the last with: "
                f"{asker.streak.last}. The same command goes on from here; cache.stop_after_failures sets the number."
            )
        if self._next is not None:
            raise UserError(
                f"stopped: {asker.budget.spent:.2f} are spent or reserved, and the next request (about "
                f"{asker.budget.price:.2f}) would exceed cache.max_cost={asker.budget.limit:g}. "
                "Everything so far is kept; raise the limit and run the same command again."
            )


@contextmanager
def _stop_on_interrupt(asker: Asker, say: Callable[[str], object]) -> Iterator[None]:
    """First Ctrl-C: finish what is in flight and stop.  Second: at once; the next run cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: object) -> None:
        if asker.stop.is_set():
            programs.kill_all()
            os._exit(INTERRUPTED)  # threads wait for the network; whatever they do may be cut off at any moment
        asker.halt()
        say("Stopping after the videos in flight; the same command goes on from there. Ctrl-C again stops at once.")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
