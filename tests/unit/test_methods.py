"""Names of runs and the figures of a comparison."""

import pytest

from afd_train.evaluation import method_figures
from afd_train.evaluation.compare import Comparison
from afd_train.evaluation.runs import split_name


@pytest.mark.parametrize(
    ("name", "split"),
    [("afd-0", ("afd", "0")), ("afd-ema-12", ("afd-ema", "12")), ("afd", ("afd", "")), ("v2", ("v2", ""))],
)
def test_a_trailing_number_is_the_seed_of_a_method(name, split):
    assert split_name(name) == split


def test_a_band_needs_steps_that_every_seed_has():
    logs = [[{"step": 0, "validation/motion": 1.0}, {"step": 5, "validation/motion": 2.0}], [{"step": 5.0}]]
    assert method_figures.bands({"afd": logs}) == ""
    assert ">motion" in method_figures.bands({"afd": logs[:1]}).replace("held-out prompts: ", "")


def test_a_folders_name_is_never_markup_or_a_formula():
    found = Comparison("seen", "higher", "<b>$x^$", "base", 3, 1.0, 0.5, 0.5, 0.1, 0.9, 0.01, p_holm=0.01)
    svg = method_figures.forest([found], ["<b>$x^$"])
    assert "&lt;b&gt;$x^$" in svg
    assert "<b>" not in svg


def test_a_metric_in_which_nothing_differs_has_no_panel():
    same = Comparison("seen", "higher", "afd", "base", 3, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    assert method_figures.forest([same], ["afd"]) == ""
