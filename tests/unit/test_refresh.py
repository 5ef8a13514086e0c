"""What a refresh makes due, and when: rules, times, and the splits of a source that grows."""

from __future__ import annotations

import random
import threading
from datetime import datetime, timedelta

import pytest

from afd_data.config import DataConfig, PlaygroundConfig, PromptsConfig, RefreshConfig
from afd_data.errors import UserError
from afd_data.margins import Margin
from afd_data.plan import Planned, plan_samples
from afd_data.prompts import Prompt
from afd_data.refresh import Known, due, new_only
from afd_data.teachers import Identity
from afd_data.watching import next_time, watch

DAY = 86400.0
NOW = 1000 * DAY


def planned(*names: str, split: str = "train", takes: int = 1, generation: int = 1) -> list[Planned]:
    recipe = DataConfig(out="unused", prompts=PromptsConfig(source="x"), teacher=PlaygroundConfig())
    recipe = recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"takes": takes})})
    prompts = [Prompt(name, f"prompt {name}", split) for name in names]
    return list(plan_samples(recipe, prompts, Identity("drawn", "1", {}), generation))


def video(age_days: float = 1.0, split: str = "train", generation: int = 0) -> Known:
    return Known(split, generation, generation, lost=False, again=False, asked_at=NOW - age_days * DAY)


def lost(age_days: float, again: bool = False, seen: int | None = 0, generation: int = 1) -> Known:
    return Known("train", generation, seen, lost=True, again=again, asked_at=NOW - age_days * DAY)


def reasons(wanted: list[Planned], known: dict[str, Known], margins=None, outdated=(), **rules) -> dict[str, str]:
    config = RefreshConfig.model_validate({"new_prompts": False, "changed_teacher": False} | rules)
    return due(config, wanted, known, set(outdated), margins or {}, NOW)


def margins(generation: int = 0, **values: float) -> dict[str, Margin]:
    return {name: Margin(name, value, 1, 1, generation) for name, value in values.items()}


def test_videos_older_than_the_limit_are_due() -> None:
    known = {"p0-00": video(6.9), "p1-00": video(7.1)}
    assert reasons(planned("p0", "p1"), known, older_than_days=7) == {"p1-00": "older_than_days"}


def test_what_was_asked_for_in_vain_is_as_old_as_that_request() -> None:
    known = {"p0-00": lost(age_days=3), "p1-00": lost(age_days=8)}
    assert reasons(planned("p0", "p1"), known, older_than_days=7) == {"p1-00": "older_than_days"}


def test_a_fraction_takes_the_oldest_first() -> None:
    known = {f"p{n}-00": video(age_days=n) for n in range(10)}
    wanted = planned(*(f"p{n}" for n in range(10)))
    assert reasons(wanted, known, fraction=0.3) == dict.fromkeys(["p9-00", "p8-00", "p7-00"], "fraction")


def test_a_small_fraction_of_few_videos_is_one() -> None:
    known = {"p0-00": video(1), "p1-00": video(2)}
    assert list(reasons(planned("p0", "p1"), known, fraction=0.01)) == ["p1-00"]


def test_a_share_is_not_rounded_up_by_floating_point() -> None:
    names = [f"p{n:02d}" for n in range(30)]
    known = {f"{name}-00": video() for name in names}
    assert len(reasons(planned(*names), known, fraction=0.1)) == 3  # 0.1 * 30 is 3.0000000000000004


def test_ties_of_age_are_the_same_whatever_the_order() -> None:
    wanted = planned(*(f"p{n}" for n in range(10)))
    known = {sample.key: video() for sample in wanted}
    shuffled = random.Random(0).sample(wanted, len(wanted))
    assert set(reasons(wanted, known, fraction=0.4)) == set(reasons(shuffled, known, fraction=0.4))


def test_the_hardest_prompts_are_due_with_all_their_takes() -> None:
    wanted = planned("p0", "p1", "p2", takes=2)
    known = {sample.key: video() for sample in wanted}
    found = reasons(wanted, known, margins(p0=0.1, p1=2.0, p2=-1.0), hardest=0.3)
    assert found == {"p1-00": "hardest", "p1-01": "hardest"}


def test_a_margin_of_a_video_that_was_replaced_since_does_not_count() -> None:
    known = {"p0-00": video(generation=1), "p1-00": video()}
    assert reasons(planned("p0", "p1"), known, margins(p0=9.0, p1=0.0), hardest=0.5) == {"p1-00": "hardest"}


def test_what_the_teacher_could_not_draw_is_not_the_hardest_again() -> None:
    known = {"p0-00": lost(age_days=1), "p1-00": video()}
    assert reasons(planned("p0", "p1"), known, margins(p0=9.0, p1=0.0), hardest=0.5) == {"p1-00": "hardest"}


def test_a_changed_teacher_makes_everything_due_that_it_was_not_asked_for() -> None:
    known = {"p0-00": video(), "p1-00": video(generation=1), "p2-00": lost(1, seen=None, generation=0)}
    found = reasons(planned("p0", "p1", "p2"), known, outdated=[0], changed_teacher=True)
    assert found == {"p0-00": "changed_teacher", "p2-00": "changed_teacher"}


def test_new_prompts_and_takes_are_due_in_every_split() -> None:
    wanted = [*planned("p0", takes=2), *planned("p1", split="test")]
    known = {"p0-00": video()}
    assert reasons(wanted, known, new_prompts=True) == {"p0-01": "new_prompts", "p1-00": "new_prompts"}
    assert new_only(wanted, known) == {"p0-01": "new_prompts", "p1-00": "new_prompts"}


def test_validation_and_test_videos_stay_what_they_are() -> None:
    wanted = [*planned("p0", split="validation"), *planned("p1", split="test")]
    known = {"p0-00": video(900, "validation"), "p1-00": video(900, "test")}
    rules = {"older_than_days": 1, "fraction": 1, "hardest": 1, "changed_teacher": True}
    assert reasons(wanted, known, margins(p0=1.0, p1=1.0), outdated=[0], **rules) == {}


def test_what_failed_and_cost_nothing_is_due_where_there_is_no_video() -> None:
    known = {"p0-00": lost(1, again=True, seen=None), "p1-00": lost(1, again=True), "p2-00": lost(1, seen=None)}
    assert reasons(planned("p0", "p1", "p2"), known) == {"p0-00": "failed"}


def test_a_sample_is_counted_by_its_first_rule() -> None:
    known = {"p0-00": video(8), "p1-00": video(1)}
    found = reasons(planned("p0", "p1"), known, margins(p0=5.0, p1=1.0), older_than_days=7, fraction=1, hardest=1)
    assert found == {"p0-00": "older_than_days", "p1-00": "fraction"}


# Times


class Clock(threading.Event):
    """A stop signal whose waiting moves the time."""

    def __init__(self, start: datetime, ends: datetime) -> None:
        super().__init__()
        self.time, self.ends = start, ends

    def now(self) -> datetime:
        return self.time

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.time += timedelta(seconds=timeout)
        return self.time >= self.ends


def watched(schedule: str, hours: float, takes_minutes: float = 0.0, error: Exception | None = None) -> list[str]:
    """When refreshes begin from Monday 2026-11-23 12:00 on."""
    start = datetime(2026, 11, 23, 12, 0)
    clock = Clock(start, start + timedelta(hours=hours))
    begun: list[str] = []

    def run(refresh: bool) -> None:
        if not refresh:
            return
        begun.append(clock.time.strftime("%d %H:%M"))
        clock.time += timedelta(minutes=takes_minutes)
        if error:
            raise error

    watch(run, schedule, clock, clock.now)
    return begun


def test_a_watch_runs_at_every_time_of_the_schedule() -> None:
    assert watched("30 */6 * * *", hours=24) == ["23 12:30", "23 18:30", "24 00:30", "24 06:30"]


def test_a_run_that_takes_longer_than_the_gap_skips_what_it_missed() -> None:
    assert watched("0 * * * *", hours=6, takes_minutes=150) == ["23 13:00", "23 16:00"]


def test_a_time_that_was_missed_before_the_start_is_left_out() -> None:
    assert watched("59 11 * * *", hours=23) == []


def test_an_error_of_one_run_is_told_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert len(watched("0 * * * *", hours=3.5, error=UserError("no credit left"))) == 3
    assert caplog.text.count("no credit left") == 3


def test_a_watch_begins_with_finishing_and_no_refresh_and_survives_an_error_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock(datetime(2026, 11, 23, 12, 0), datetime(2026, 11, 23, 14, 30))
    asked: list[bool] = []

    def run(refresh: bool) -> None:
        asked.append(refresh)
        if not refresh:
            raise UserError("no network yet")

    watch(run, "0 * * * *", clock, clock.now)
    assert asked == [False, True, True]
    assert "no network yet" in caplog.text


def test_a_schedule_is_looked_at_before_anything_is_asked() -> None:
    with pytest.raises(UserError, match="not a cron expression"):
        watch(lambda refresh: pytest.fail("asked"), "0 25 * * *")


def test_a_run_that_ends_after_clocks_were_set_back_is_not_due_again() -> None:
    clock = Clock(datetime(2026, 10, 25, 1, 0), datetime(2026, 10, 27, 0, 0))
    begun: list[datetime] = []

    def run(refresh: bool) -> None:
        if refresh:
            begun.append(clock.time)
            clock.time -= timedelta(minutes=25)  # 35 minutes of work, and an hour back

    watch(run, "30 2 * * *", clock, clock.now)
    assert begun == [datetime(2026, 10, 25, 2, 30), datetime(2026, 10, 26, 2, 30)]


def test_an_error_of_ours_ends_the_watch() -> None:
    with pytest.raises(ZeroDivisionError):
        watched("0 * * * *", hours=3, error=ZeroDivisionError())


def test_ctrl_c_while_waiting_ends_the_watch_and_while_running_is_passed_on() -> None:
    class Interrupted(Clock):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    clock = Interrupted(datetime(2026, 1, 1), datetime(2027, 1, 1))
    watch(lambda refresh: None, "0 * * * *", clock, clock.now)
    with pytest.raises(KeyboardInterrupt):
        watched("0 * * * *", hours=2, error=KeyboardInterrupt())  # type: ignore[arg-type]


def test_the_next_time_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "afd_data")
    watched("0 3 * * 1", hours=1)
    assert "next refresh: Monday 2026-11-30 03:00" in caplog.text


@pytest.mark.parametrize(
    ("schedule", "message"),
    [(None, "at which times"), ("0 25 * * *", "not a cron expression"), ("0 0 30 2 *", "not a cron expression")],
)
def test_a_schedule_that_is_none_is_refused(schedule: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        next_time(schedule, datetime(2026, 1, 1))
