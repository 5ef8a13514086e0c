"""What a run writes about itself, and that a resumed run's log equals an unbroken one's."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from afd_train.runlog import RunLog, Stopwatch, read_metrics


def write(folder: Path, resume_from: int | None, steps: range) -> None:
    """Log `steps`, each with a loss that follows from the step."""
    runlog = RunLog(folder, Accelerator(), resume_from, steps=10)
    for step in steps:
        runlog.write(step, {"student/loss": 1 / (step + 7)}, {"seconds/update": 0.1})
    runlog.close()


def test_a_line_a_step_holds_the_metrics_and_no_clock(tmp_path):
    write(tmp_path, None, range(2))
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 0, "student/loss": 0.14285714285714285}\n{"step": 1, "student/loss": 0.125}\n'
    )
    assert [row.keys() for row in read_metrics(tmp_path / "timings.jsonl")] == [{"step", "seconds/update"}] * 2


def test_a_resumed_log_equals_an_unbroken_one_byte_for_byte(tmp_path):
    write(tmp_path / "unbroken", None, range(-2, 6))
    write(tmp_path / "resumed", None, range(-2, 5))  # killed after step 4, the last checkpoint is that of step 3
    write(tmp_path / "resumed", 3, range(3, 6))
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "resumed")]
    assert logs[0] == logs[1]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, None, range(3))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "student/lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    write(tmp_path, 3, range(3, 3))
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_new_run_forgets_the_log_of_one_that_never_reached_a_checkpoint(tmp_path):
    write(tmp_path, None, range(-5, 0))
    write(tmp_path, None, range(-5, -3))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [-5, -4]


def test_the_warm_up_survives_a_resumption_at_step_0(tmp_path):
    write(tmp_path, None, range(-3, 2))
    write(tmp_path, 0, range(0))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [-3, -2, -1]


def test_a_log_that_is_not_there_is_empty(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_stopwatch_adds_up_parts_and_starts_anew_when_read():
    watch = Stopwatch()
    for part in ("rollout", "update", "rollout"):
        with watch(part):
            pass
    seconds = watch.read()
    assert seconds.keys() == {"seconds/rollout", "seconds/update"}
    assert all(value >= 0 for value in seconds.values())
    assert watch.read() == {}


def test_the_stopwatch_counts_a_part_that_fails():
    watch = Stopwatch()
    with pytest.raises(ZeroDivisionError), watch("update"):
        _ = 1 / 0
    assert "seconds/update" in watch.read()


def test_lines_to_be_kept_are_not_written_anew(tmp_path):
    # Only then can a kill at that moment not lose them; this line shows it by its spaces.
    (tmp_path / "metrics.jsonl").write_text('{"step":   0}\n{"step":   1}\n')
    write(tmp_path, 1, range(0))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":   0}\n'
