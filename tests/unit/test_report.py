"""The report page and its gallery, made from drawn videos."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from afd_data.config import VideoConfig
from afd_data.teacher_config import FlawsConfig
from afd_data.teachers.world import simulate
from afd_data.video import read_video
from afd_train.evaluation import figures, gallery, report
from afd_train.evaluation.compare import Cell, Comparison, Summary
from afd_train.evaluation.metric import Metric

METRIC = Metric("higher", "share of frames", "Frames that show the ball.")
VIDEO = VideoConfig(width=16, height=16, frames=6, fps=8.0)
WIN = Comparison("seen", "higher", "ema", "base", 64, 0.92, 0.83, 0.09, 0.06, 0.12, 0.001, 0.1, 0.002, True)


def drawn(seed: int) -> np.ndarray:
    return simulate("A red ball is dropped.", seed, VIDEO, FlawsConfig())[0]


def page(tmp_path: Path, **changes: object) -> str:
    cells = [
        Cell("seen", policy, mean, mean - 0.02, mean + 0.02, 64, 256, failed)
        for policy, mean, failed in (("teacher", 0.99, 0), ("base", 0.83, 7), ("ema", 0.92, 0))
    ]
    values = [("teacher", "99.0 %", False), ("base", "failed", True), ("student (EMA)", "92.0 %", False)]
    mp4 = gallery.compose([("teacher", drawn(1)), ("base", None), ("student (EMA)", drawn(2))], 8.0)
    made = report.Report(
        title="A run",
        header={"git commit": "0123abc", "seeds": "recipe 0"},
        summary=Summary(cells, [WIN], {"warp": "no video could be measured"}),
        groups={"Physics": {"seen": METRIC, "warp": METRIC}},
        primary="seen",
        gallery=[report.Row("A <script>alert(1)</script> ball & more", "largest win", values, mp4)],
        steps=[{"step": float(step), "student/loss": 1 / (step + 1)} for step in range(5)],
    )
    report.write_report(tmp_path / "report.html", replace(made, **changes))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path):
    html = page(tmp_path)
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", html)
    assert "<script" not in html
    sources = re.findall(r"src=\"([^\"]{0,30})", html)
    assert sources
    assert all(source.startswith("data:video/mp4;base64,") for source in sources)


def test_a_prompt_is_text_and_never_markup(tmp_path):
    html = page(tmp_path)
    assert "A &lt;script&gt;alert(1)&lt;/script&gt; ball &amp; more" in html


def test_the_page_shows_table_failures_curves_definitions_and_provenance(tmp_path):
    html = page(tmp_path)
    for text in ("92.0 %", "+9.0 pts", "7 of 256 failed", "no video could be measured", METRIC.definition, "0123abc"):
        assert text in html
    assert 'class="failed">base: failed' in html
    assert html.count("<svg") == 2  # forest and training curves


def test_only_a_significant_difference_is_bold(tmp_path):
    assert "<b>+9.0 pts</b>" in page(tmp_path)
    unsure = Summary([Cell("seen", "ema", 0.9, 0.8, 1.0, 64, 256, 0)], [replace(WIN, p_holm=0.06)], {})
    assert "<b>+9.0 pts</b>" not in page(tmp_path, summary=unsure)


def test_a_page_without_gallery_and_training_log_is_still_a_page(tmp_path):
    html = page(tmp_path, gallery=[], steps=[])
    assert "<video" not in html
    assert "The adapted student (EMA) is better" in html


def test_the_verdict_says_better_worse_or_undecided_from_the_primary_interval():
    assert report.verdict([WIN], "seen", METRIC) == (
        "better",
        "The adapted student (EMA) is better than the base: seen 92.0 % against 83.0 % "
        "(+9.0 pts, 95 % interval +6.0 pts to +12.0 pts, 64 prompts).",
    )
    worse = replace(WIN, better="lower")
    assert report.verdict([worse], "seen", METRIC)[0] == "worse"
    unsure = replace(WIN, lo=-0.01)
    assert report.verdict([unsure], "seen", METRIC)[0] == "undecided"
    assert "cannot be told from the base" in report.verdict([unsure], "seen", METRIC)[1]
    assert report.verdict([], "seen", METRIC)[0] == "undecided"


def test_values_are_printed_in_their_units():
    assert report.show(0.123, METRIC) == "12.3 %"
    assert report.show(0.99432, Metric("higher", "share of full scale", "")) == "99.43 %"
    assert report.show(12.345, Metric("higher", "px", "")) == "12.3"
    assert report.show_delta(-0.5, Metric("higher", "px", "")) == "-0.5"
    assert [report.show_p(p) for p in (0.0004, 0.012, 0.5)] == ["< 0.001", "0.012", "0.50"]


def test_the_gallery_leads_with_the_largest_win_and_loss_and_says_so():
    base = {(f"p{index}", take): 0.5 for index in range(6) for take in range(2)}
    student = base | {("p3", 1): 0.9, ("p1", 0): 0.1}
    chosen = gallery.choose(student, base, "higher", rows=4)
    assert chosen[0] == gallery.Choice("p3", 1, "largest win of all clips")
    assert chosen[1] == gallery.Choice("p1", 0, "largest loss of all clips")
    assert [choice.prompt_id for choice in chosen[2:]] == ["p0", "p5"]


def test_a_lower_is_better_metric_wins_by_falling():
    chosen = gallery.choose({("a", 0): 0.1, ("b", 0): 0.9}, {("a", 0): 0.5, ("b", 0): 0.5}, "lower", rows=1)
    assert chosen == [gallery.Choice("a", 0, "largest win of all clips")]


def test_a_gallery_has_no_more_rows_than_clips():
    same = {("a", 0): 0.5, ("b", 0): 0.5}
    assert len(gallery.choose(same, same, "higher", rows=8)) == 2
    assert gallery.choose(same, same, "higher", rows=0) == []


def test_clips_stand_side_by_side_as_enlarged_squares():
    left, right = drawn(1), drawn(2)
    found = read_video(gallery.compose([("teacher", left), ("base", right)], 8.0)).frames
    width, height = gallery.shown_size(16, 16)
    assert (width, height) == (160, 160)
    assert found.shape == (6, gallery.LABEL + height + gallery.BAR, 2 * width + gallery.GAP, 3)
    shown = found[3, gallery.LABEL : gallery.LABEL + height, width + gallery.GAP :]
    centres = shown[5::10, 5::10].astype(int)  # the middle of each enlarged pixel
    assert np.abs(centres - right[3]).mean() < 8  # 4:2:0 and crf 20 cost a little


def test_a_missing_clip_is_an_empty_field_and_a_short_one_holds_its_last_frame():
    short = drawn(1)[:2]
    found = read_video(gallery.compose([("teacher", drawn(1)), ("base", None), ("ema", short)], 8.0)).frames
    assert len(found) == 6
    blank = found[:, gallery.LABEL + 20, 166 + 80]
    assert np.abs(blank.astype(int) - gallery.BLANK).max() < 8
    with pytest.raises(ValueError, match="at least one clip"):
        gallery.compose([("teacher", None)], 8.0)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((16, 16), (160, 160)), ((32, 24), (224, 168)), ((832, 480), (320, 184)), ((176, 144), (176, 144))],
)
def test_small_worlds_grow_by_whole_factors_and_large_ones_shrink(size, shown):
    assert gallery.shown_size(*size) == shown


def test_the_same_figure_is_drawn_with_the_same_bytes():
    assert figures.forest([WIN]) == figures.forest([WIN])
    assert figures.forest([]) == ""
    assert figures.curves([{"step": 0.0}]) == ""
