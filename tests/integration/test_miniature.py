"""A study of the miniature's harness in a tiny world: it is finished in parts, and refuses what would mix settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.miniature import ledger
from tests.benchmarks.miniature.__main__ import main

pytestmark = pytest.mark.slow  # five processes that each load torch: 30 s on an idle core
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
RECIPE = """
out: runs/tiny
video: {width: 16, height: 16, frames: 4, fps: 8.0, lossless: true}
prompts: {source: prompts.txt, validation: 4, test: 4, near_duplicate: 1.0}
teacher: {name: playground}
cache: {takes: 1, eval_takes: 2, frozen: 0.0, near_duplicate: -1}
student: {dim: 24, heads: 2, layers: 1, ffn_dim: 32, text_tokens: 6, text_dim: 16}
discriminator: {dim: 16, heads: 2, layers: 1, warmup_steps: 2, warmup_prompts: 4}
train: {prompts_per_step: 2, rollouts_per_prompt: 2}
eval: {clips_per_prompt: 2}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with 16 prompts and a student with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [f"A {colour} ball is {verb}." for colour in COLOURS for verb in ("dropped", "thrown to the right")]
    (folder / "prompts.txt").write_text("\n".join(texts))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder / "tiny.yaml"


def study(world: Path, *more: str) -> int:
    """One call of the command; half a second of training a run."""
    options = ["--minutes-per-run", "0.01", "--out", str(world.parent / "out"), "--jobs", "1"]
    return main(["--world", str(world), *options, "--ledger", str(world.parent / "uses.jsonl"), *more])


def results(world: Path, split: str) -> dict:
    return json.loads((world.parent / "out" / "tiny" / split / "results.json").read_text())


def test_a_study_goes_on_where_it_was_and_tests_once(world, capsys):
    assert study(world, "--methods", "base", "afd", "--seeds", "1") == 0
    first = results(world, "validation")
    assert set(first["values"]) == {"base", "afd"}
    assert first["budgets"]["afd"]["seconds"]["0"] > 0
    assert first["budgets"]["afd"]["d updates"]["0"] == first["budgets"]["afd"]["updates"]["0"] + 2  # the warm-up
    runs = world.parent / "out" / "tiny" / "runs"
    log = (runs / "afd-0" / "train" / "metrics.jsonl").read_bytes()

    (runs / "base-0" / "validation.json").unlink()  # as if it had been stopped before
    assert study(world, "--methods", "base", "afd", "--seeds", "2") == 0
    second = results(world, "validation")
    for method in ("base", "afd"):
        assert second["values"][method]["perm"]["0"] == first["values"][method]["perm"]["0"]
    assert set(second["values"]["afd"]["perm"]) == {"0", "1"}
    assert (runs / "afd-0" / "train" / "metrics.jsonl").read_bytes() == log
    assert {path.name for path in (runs.parent / "validation").iterdir()} == {
        *("results.json", "table.md", "teacher.json", "plots.png", "plots.svg")
    }

    assert study(world, "--methods", "afd", "--seeds", "2", "--set", "train.learning_rate=0.5") == 2
    assert "holds a run with other settings (train.learning_rate: None, now 0.5)" in capsys.readouterr().err

    assert study(world, "--methods", "base", "afd", "--seeds", "1", "--split", "test") == 0
    assert study(world, "--methods", "base", "afd", "--seeds", "2", "--split", "test") == 0
    assert len(ledger.read(world.parent / "uses.jsonl")) == 2
    assert results(world, "test")["header"]["split"] == "test"
    assert study(world, "--methods", "afd", "--split", "test", "--set", "train.learning_rate=0.5") == 2
    assert "was measured on the test prompts" in capsys.readouterr().err
