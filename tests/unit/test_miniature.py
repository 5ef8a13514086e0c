"""The miniature's harness: its methods are recipes, its statistics are right, its book of test uses is kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from afd_data.errors import UserError
from afd_train.config import Recipe
from afd_train.recipe import load_recipe
from afd_train.shipped import shipped_folder, shipped_student
from tests.benchmarks.miniature import ledger
from tests.benchmarks.miniature.__main__ import listing, main
from tests.benchmarks.miniature.budgets import clips_per_step
from tests.benchmarks.miniature.digests import DRAWN, TRAINED, VIDEOS, digest_of
from tests.benchmarks.miniature.markdown import page
from tests.benchmarks.miniature.measuring import METRICS, diversity
from tests.benchmarks.miniature.methods import AFD, BASE, GROUPS, METHODS, chosen, resolved, settings_of
from tests.benchmarks.miniature.plots import write_plots
from tests.benchmarks.miniature.results import Results
from tests.benchmarks.miniature.statistics import Mean, mean_of, paired, with_holm

WORLDS = ("multimodal", "deterministic", "framewise")


def recipe_of(method: str, world: str = "multimodal", **own: str) -> Recipe:
    return resolved(world, settings_of(METHODS[method], world, minutes=2, own=own))


@pytest.mark.parametrize("world", WORLDS)
def test_every_method_is_a_valid_recipe_with_the_same_seconds(world):
    takes = 1 if world == "deterministic" else 4  # there a prompt has one right video
    for name in METHODS:
        recipe = recipe_of(name, world)
        assert (recipe.train.seconds, recipe.cache.takes, len(recipe.student.steps) > 0) == (120, takes, True)


def test_methods_differ_from_afd_in_what_their_names_say():
    afd = recipe_of(AFD)
    assert recipe_of("frozen-d").discriminator.learning_rate == 0
    assert recipe_of("d-lr-10").discriminator.learning_rate == pytest.approx(10 * afd.discriminator.learning_rate)
    assert recipe_of("shuffled").train.objective == afd.train.objective.model_copy(update={"shuffled_advantages": True})
    assert len(recipe_of("sft-steps-16").student.steps) == 16
    assert recipe_of("sft-steps-16").train == recipe_of("sft").train


def test_a_discriminators_rate_is_a_multiple_of_what_the_command_line_sets():
    own = {"discriminator.learning_rate": "2.0e-4"}
    settings = settings_of(METHODS["d-lr-0.2"], "multimodal", 2, own)
    assert resolved("multimodal", settings).discriminator.learning_rate == pytest.approx(4e-5)


def test_the_quickstart_is_the_methods_branching_for_longer():
    quickstart, method = load_recipe("quickstart"), recipe_of("afd-branch")
    assert quickstart.discriminator == method.discriminator
    same = ("objective", "prompts_per_step", "rollouts_per_prompt", "learning_rate", "evaluation_ema")
    assert quickstart.train.model_dump(include=set(same)) == method.train.model_dump(include=set(same))
    assert (quickstart.student, quickstart.teacher, quickstart.cache) == (method.student, method.teacher, method.cache)


def test_groups_hold_methods_and_bring_whose_students_they_draw():
    assert all(name in METHODS for group in GROUPS.values() for name in group)
    assert [method.name for method in chosen(["sft-steps-4", BASE])] == [BASE, "sft", "sft-steps-4"]
    assert all(name in listing() for name in (*METHODS, *GROUPS))
    with pytest.raises(UserError, match="--methods sftt: unknown"):
        chosen(["sftt"])


@pytest.mark.parametrize("folder", sorted((shipped_folder() / "miniature" / "bases").glob("*")), ids=lambda p: p.name)
def test_a_base_of_the_miniature_is_found_by_its_name(folder):
    assert shipped_student(f"miniature/{folder.name}") == folder


@pytest.mark.parametrize("name", ["flow", "miniature/none", "../recipes", "/flow", "miniature/../flow", "a/b/c", ""])
def test_other_names_are_no_shipped_students(name):
    assert shipped_student(name) is None


def test_an_interval_is_students():
    found = mean_of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 * 1 / np.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom; sd 1
    assert mean_of([5.0]) == Mean(5.0, None, 1)


def test_differences_are_paired_by_seed():
    found = paired({0: 1.0, 1: 3.0, 2: 5.0, 7: 9.0}, {2: 2.0, 1: 1.0, 0: 0.0})  # 1, 2, 3: t = 2 sqrt(3)
    assert found is not None
    assert (found.difference, found.n) == (2, 3)
    assert found.p == pytest.approx(0.0741799, rel=1e-5)
    assert paired({0: 1.0}, {1: 1.0}) is None
    single = paired({0: 1.0}, {0: 3.0})
    assert single is not None
    assert (single.difference, single.half, single.p) == (-2, None, None)


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (1.0, 0.0)])
def test_differences_without_spread_are_certain(shift, p):
    found = paired({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
    assert found is not None
    assert found.p == p


def test_p_values_are_adjusted_over_the_methods_that_have_one():
    tests = {
        "a": paired({0: 1.0, 1: 3.0, 2: 5.0}, {0: 0.0, 1: 1.0, 2: 2.0}),
        "b": paired({0: 4.0, 1: 4.0, 2: 4.0}, {0: 0.0, 1: 0.0, 2: 0.0}),
        "c": paired({0: 1.0}, {0: 0.0}),
    }
    found = with_holm({name: test for name, test in tests.items() if test is not None})
    assert found["b"].p_holm == 0
    assert found["a"].p_holm == found["a"].p  # the larger of two stays as it is
    assert found["c"].p_holm is None


def test_diversity_is_the_mean_distance_of_two_takes():
    assert diversity({"a": np.array([[0.0], [1.0], [3.0]]), "b": np.array([[7.0]])}) == pytest.approx((1 + 3 + 2) / 3)
    assert diversity({"a": np.array([[0.0]])}) == 0


@pytest.mark.parametrize(("method", "clips"), [("sft", 0), ("dmd", 8), (AFD, 64), ("gan", 64), ("afd-branch", 128)])
def test_videos_drawn_in_a_step_are_counted(method, clips):
    assert clips_per_step(recipe_of(method).train) == clips


def test_a_digest_follows_settings_and_the_content_of_files_but_no_folder_or_seed(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(resolved_prompts())
    same = recipe_of(AFD, **{"out": "elsewhere", "seed": "3", "prompts.source": str(tmp_path / "prompts.txt")})
    assert digest_of(recipe_of(AFD), TRAINED) == digest_of(same, TRAINED)
    slower = recipe_of(AFD, **{"train.learning_rate": "1.0e-5"})
    assert digest_of(recipe_of(AFD), TRAINED) != digest_of(slower, TRAINED)
    assert digest_of(recipe_of(AFD), DRAWN) == digest_of(slower, DRAWN)  # the base's numbers do not depend on it
    assert digest_of(recipe_of("sft-style"), VIDEOS) != digest_of(recipe_of("sft"), VIDEOS)
    on = recipe_of(AFD, **{"discriminator.mismatch_weight": "1"})
    assert digest_of(recipe_of(AFD), TRAINED) != digest_of(on, TRAINED)
    (tmp_path / "prompts.txt").write_text("a red ball falls")
    assert digest_of(recipe_of(AFD), VIDEOS) != digest_of(same, VIDEOS)


def test_an_option_that_is_off_changes_no_digest(monkeypatch):
    before = digest_of(recipe_of(AFD), TRAINED)
    dump = Recipe.model_dump

    def with_new_ones(self: Recipe, **settings: Any) -> dict[str, Any]:
        dumped = dump(self, **settings)
        dumped["train"] |= {"new": None, "newer": {"also": 0.0, "and": []}}
        return dumped

    monkeypatch.setattr(Recipe, "model_dump", with_new_ones)
    assert digest_of(recipe_of(AFD), TRAINED) == before


def resolved_prompts() -> bytes:
    return (shipped_folder() / "prompts" / "playground-one-ball.txt").read_bytes()


def test_tested_settings_may_be_measured_again_and_others_may_not(tmp_path):
    book = tmp_path / "uses.jsonl"
    ledger.record(book, "multimodal", {"afd": "1", "sft": "2"}, None, "abc")
    ledger.check(book, "multimodal", {"afd": "1", "gan": "5"}, None)  # the same, and a new method
    ledger.check(book, "framewise", {"afd": "9"}, None)  # another world
    with pytest.raises(UserError, match=r"sft in multimodal was measured on the test prompts .* --use-test-again"):
        ledger.check(book, "multimodal", {"afd": "1", "sft": "3"}, None)


def test_a_use_for_a_reason_is_written_down_with_it(tmp_path):
    book = tmp_path / "uses.jsonl"
    ledger.record(book, "multimodal", {"afd": "1"}, None, "abc")
    ledger.check(book, "multimodal", {"afd": "2"}, "a bug in the sampler")
    ledger.record(book, "multimodal", {"afd": "2"}, "a bug in the sampler", "abc (changed)")
    first, second = ledger.read(book)
    assert [(use["commit"], use["dirty"]) for use in (first, second)] == [("abc", False), ("abc", True)]
    assert "reason" not in first
    assert second["reason"] == "a bug in the sampler"
    assert set(first) == {"date", "commit", "dirty", "world", "methods"}
    ledger.check(book, "multimodal", {"afd": "2"}, None)  # both are known now
    ledger.check(book, "multimodal", {"afd": "1"}, None)


def test_the_command_refuses_other_settings_on_the_test_prompts_before_it_does_anything(tmp_path, capsys):
    book, out = tmp_path / "uses.jsonl", tmp_path / "out"
    ledger.record(book, "multimodal", {"afd": "other"}, None, "abc")
    arguments = ["--methods", "afd", "--split", "test", "--ledger", str(book), "--out", str(out)]
    assert main(arguments) == 2
    assert "measured on the test prompts" in capsys.readouterr().err
    assert not out.exists()
    assert len(ledger.read(book)) == 1


def some_results() -> Results:
    values = {
        name: {metric: {seed: start + seed for seed in range(3)} for metric in METRICS}
        for start, name in ((10.0, BASE), (12.0, "sft"), (11.0, "sft-steps-4"), (15.0, AFD))
    }
    header = {"command": "python -m x", "world": "multimodal", "split": "validation"}
    spent = {AFD: {"seconds": {0: 120.0, 1: 121.0, 2: 122.0}}}
    return Results(header, values, dict.fromkeys(METRICS, 100.0), spent)


def test_the_table_shows_means_differences_and_budgets():
    text = page(some_results())
    row = next(line for line in text.splitlines() if line.startswith("| afd | 3"))
    assert row.startswith("| afd | 3 | 16.0 ± 2.5 |")  # 15, 16, 17: 4.303 / sqrt(3)
    assert "| 121 ± 2 |" in row
    against_base = text.split("## Difference to base")[1]
    assert "| afd | +5.0 ± 0.0 (0; 0) |" in against_base
    assert "`python -m x`" in text
    json.dumps(some_results().to_json(), allow_nan=False)


def test_plots_are_written_as_png_and_svg(tmp_path):
    write_plots(some_results(), tmp_path)
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "plots.svg").read_text()
    assert svg.count('id="axes_') == 3 * -(-(len(METRICS) + 2) // 3)  # a panel a metric, scatter, sweep; whole rows
