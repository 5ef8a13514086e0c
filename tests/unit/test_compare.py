"""Rows -> cells and comparisons, on numbers that can be followed by hand."""

import numpy as np
import pyarrow.parquet
import pytest

from afd_train.evaluation import compare
from afd_train.evaluation.metric import Metric

SCORE = {"score": Metric("higher", "share of frames", "A score.")}


def rows_of(policy: str, values: dict[str, list[float]], metric: str = "score") -> list[compare.Row]:
    return [
        compare.Row(policy, prompt, f"text of {prompt}", take, metric, value, step=0)
        for prompt, takes in values.items()
        for take, value in enumerate(takes)
    ]


def summarise(rows: list[compare.Row], metrics: dict[str, Metric] = SCORE) -> compare.Summary:
    return compare.summarise(rows, metrics, resamples=500, seed=0)


def test_a_cell_is_the_mean_over_prompts_not_over_clips():
    (cell,) = summarise(rows_of("base", {"a": [0.0], "b": [1.0, 1.0, 1.0]})).cells
    assert (cell.mean, cell.n, cell.clips, cell.failed) == (0.5, 2, 4, 0)


def test_delta_is_a_minus_b_over_the_prompts_that_both_have():
    rows = rows_of("ema", {"a": [0.5], "b": [0.9], "only-ema": [0.0]}) + rows_of("base", {"a": [0.25], "b": [0.25]})
    (found,) = summarise(rows).comparisons
    assert (found.a, found.b, found.n, found.better) == ("ema", "base", 2, "higher")
    assert (found.mean_a, found.mean_b) == (pytest.approx(0.7), 0.25)
    assert found.delta == pytest.approx(0.45)
    assert found.p == 0.5  # of the four sign patterns only ++ and -- reach the sum


def test_a_failed_clip_lowers_its_prompt_to_the_worst_value_and_is_counted():
    rows = rows_of("ema", {"a": [np.nan, 1.0]}) + rows_of("base", {"a": [0.2, 0.6]})
    summary = summarise(rows)
    cells = {cell.policy: cell for cell in summary.cells}
    assert cells["ema"].mean == pytest.approx(0.6)  # (0.2 + 1.0) / 2
    assert cells["ema"].failed == 1


def test_a_metric_that_no_clip_has_is_skipped_with_the_reason():
    metrics = SCORE | {"other": Metric("lower", "px", "Another.")}
    summary = summarise(rows_of("base", {"a": [1.0]}) + rows_of("base", {"a": [np.nan]}, "other"), metrics)
    assert summary.skipped == {"other": "no video could be measured"}
    assert summarise([]).skipped == {"score": "does not apply to this teacher"}


def test_one_prompt_has_no_interval():
    (found,) = summarise(rows_of("ema", {"a": [1.0]}) + rows_of("base", {"a": [0.0]})).comparisons
    assert (found.lo, found.hi, found.sd) == (None, None, None)


def test_a_yes_or_no_that_all_videos_pass_still_has_an_interval():
    moves = {"moves": Metric("higher", "share of videos", "Moves.")}
    (cell,) = summarise(rows_of("base", {str(n): [1.0] for n in range(10)}, "moves"), moves).cells
    assert cell.hi == pytest.approx(1.0)
    assert cell.lo == pytest.approx(10 / (10 + 3.8415), abs=1e-4)  # Wilson for 10 of 10


def test_holm_counts_the_metrics_of_each_pair_and_marks_the_primary_one():
    def comparison(metric: str, a: str, p: float) -> compare.Comparison:
        return compare.Comparison(metric, "higher", a, "base", 9, 1.0, 0.0, 1.0, 0.5, 1.5, p)

    found = compare.with_holm(
        [comparison("x", "ema", 0.01), comparison("y", "ema", 0.04), comparison("x", "teacher", 0.04)], primary="x"
    )
    assert [each.p_holm for each in found] == pytest.approx([0.02, 0.04, 0.04])
    assert [each.primary for each in found] == [True, False, True]


def test_rows_survive_parquet_with_their_failures(tmp_path):
    compare.write_rows(tmp_path / "metrics.parquet", rows_of("base", {"a": [0.25, np.nan]}))
    table = pyarrow.parquet.read_table(tmp_path / "metrics.parquet")
    assert table.column_names == ["policy", "prompt_id", "prompt", "take", "metric", "value", "step"]
    values = table.column("value").to_numpy()
    assert values[0] == 0.25
    assert np.isnan(values[1])
