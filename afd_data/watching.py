"""Refreshing on a schedule: a cron expression in local time, for as long as the process lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from afd_data.errors import UserError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 30.0  # at the clock while waiting: it may be set, and machines sleep


def watch(
    run_once: Callable[[bool], object],
    schedule: str | None,
    stop: threading.Event | None = None,
    now: Callable[[], datetime] = datetime.now,
) -> None:
    """Call `run_once(True)` at every time of `schedule`, until `stop` is set or Ctrl-C is pressed while waiting.

    At the start `run_once(False)`, which finishes what is unfinished and refreshes nothing: however often a watch is
    started again, no round is bought but those of the schedule.  What became due while a run took its time, or before
    the call, is left out, and no time comes twice when clocks are set back.  A UserError of a run is logged and the
    next run comes at its time; anything else, Ctrl-C during a run too, ends the watch.
    now: the local time, without a zone.  Raises UserError: no schedule, or one that is no cron expression or never due.
    """
    stop = stop or threading.Event()
    due = datetime.min
    next_time(schedule, now())  # before hours of work: is it one?
    _tried(run_once, False)
    while True:
        due = next_time(schedule, max(now(), due))
        log.info("next refresh: %s", due.strftime("%A %Y-%m-%d %H:%M"))
        if not _wait(due, stop, now):
            return
        _tried(run_once, True)


def _tried(run_once: Callable[[bool], object], refresh: bool) -> None:
    try:
        run_once(refresh)
    except UserError as error:
        log.error("%s", error)


def next_time(schedule: str | None, after: datetime) -> datetime:
    """The first time of a cron expression that is later than `after`.  Raises UserError."""
    from cronsim import CronSim, CronSimError

    if schedule is None:
        raise UserError(
            "--watch: at which times? Give it a cron expression such as '0 3 * * 1', or set refresh.schedule."
        )
    try:
        return next(CronSim(schedule, after))
    except (CronSimError, StopIteration) as error:
        text = str(error) or "no such time in the next 50 years"
        raise UserError(f"--watch: {schedule!r} is not a cron expression ({text}); for example '0 3 * * 1'") from None


def _wait(due: datetime, stop: threading.Event, now: Callable[[], datetime]) -> bool:
    """Whether the time has come; False when told to stop."""
    try:
        while (left_s := (due - now()).total_seconds()) > 0:
            if stop.wait(min(left_s, LOOK_EVERY_S)):
                return False
    except KeyboardInterrupt:
        return False
    return not stop.is_set()
