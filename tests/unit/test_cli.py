"""The command: help, exit codes, what is printed where."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from afd_data.errors import UserError

RECIPE = """\
out: runs/a
prompts: {source: prompts.txt, test: 1}
teacher: {name: playground}
eval: {clips_per_prompt: 3}
"""
PROMPTS = "a red ball falls\na large blue ball rolls to the left\na small green box slides down\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that the test runs in, with a recipe and its prompts."""
    (tmp_path / "a.yaml").write_text(RECIPE)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def group_that_raises(error: BaseException) -> click.Group:
    @click.group(cls=importlib.import_module("afd_cli.errors").MistakesGroup)
    def group() -> None: ...

    @group.command()
    def go() -> None:
        raise error

    return group


def test_help_lists_the_commands_and_cuts_no_summary(afd):
    text = afd("--help").stdout
    for name in ("cache-teacher", "train", "eval", "run", "generate", "cache"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    assert "..." not in text.partition("Commands:")[2]


def test_help_of_cache_lists_its_commands_and_cuts_no_summary(afd):
    text = afd("cache", "--help").stdout
    for name in ("status", "inspect", "verify", "reconcile", "resubmit", "give-up", "prune", "merge", "push", "pull",
                 "migrate"):  # fmt: skip
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    assert "..." not in text.partition("Commands:")[2]


CACHE_COMMANDS = [
    f"cache {name}" for name in ("status", "reconcile", "resubmit", "give-up", "prune", "merge", "push", "pull")
]


@pytest.mark.parametrize("command", ["cache-teacher", "train", "eval", "run", "generate", *CACHE_COMMANDS])
def test_help_of_a_command_shows_an_example(afd, command):
    assert re.search(rf"^    afd {command} \w", afd(*command.split(), "--help").stdout, re.MULTILINE)


def test_version_is_printed(afd):
    assert re.fullmatch(r"afd, version \d+\.\d+\.\d+\n", afd("--version").stdout)


@pytest.mark.parametrize("command", ["cache-teacher", "train", "eval", "run"])
def test_a_dry_run_prints_recipe_and_plan_and_writes_nothing(afd, folder, command):
    before = sorted(folder.rglob("*"))
    result = afd(command, "a", "--dry-run", "--set", "train.steps=5")
    assert result.exit_code == 0
    assert "  steps: 5  # --set" in result.stdout
    assert "# cache-teacher  playground; prompts: 2 train, 0 validation, 1 test" in result.stdout
    assert "#                3 videos, 0 of them there, 3 requests to make" in result.stdout
    assert "cost: 0 (a free teacher)" in result.stdout
    # 5 steps x 8 prompts x 8 rollouts; 1 prompt x 3 clips x 3 policies
    assert "afd, 5 steps x 8 prompts x 8 rollouts = 320 clips" in result.stdout
    assert "(base, student, ema) = 9 clips" in result.stdout
    assert sorted(folder.rglob("*")) == before


def test_the_output_of_a_dry_run_is_a_recipe(afd, folder):
    (folder / "b.yaml").write_text(afd("run", "a", "--dry-run").stdout)
    first, second = (afd("run", name, "--dry-run").stdout for name in ("a", "b"))
    assert [line.partition("#")[0].rstrip() for line in first.splitlines()] == [
        line.partition("#")[0].rstrip() for line in second.splitlines()
    ]


def test_caching_then_a_dry_run_finds_the_videos_there(afd, folder):
    result = afd("cache-teacher", "a")
    assert result.exit_code == 0, result.output
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "3 videos, 3 of them there, 0 requests to make" in afd("run", "a", "--dry-run").stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_run_until_a_stage_stops_after_it_and_the_cache_can_be_looked_at(afd, folder):
    result = afd("run", "a", "--until", "cache-teacher")
    assert result.stdout.startswith("[1/1] cache-teacher\n")
    assert not (folder / "runs/a/train").exists()
    assert "3 samples planned" in afd("cache", "status", "runs/a/cache").stdout
    assert "contact sheet: sheet.png" in afd("cache", "inspect", "runs/a/cache", "-o", "sheet.png").stdout
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert afd("cache", "verify", "runs/a/cache").stdout == "runs/a/cache: every hash is right\n"


def test_a_mistake_is_one_message_on_stderr_and_exit_code_2(afd, folder):
    result = afd("train", "a", "--set", "train.stepz=5")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: --set: train.stepz: unknown key. Did you mean steps?")
    assert "Traceback" not in result.stderr


def test_verbose_also_says_which_line_raised(afd, folder):
    result = afd("-v", "train", "a", "--set", "train.stepz=5")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_path_that_cannot_be_used_is_a_mistake():
    error = PermissionError(13, "Permission denied", "/data/x.mp4")
    result = CliRunner().invoke(group_that_raises(error), ["go"])
    assert (result.exit_code, result.stderr) == (2, "error: /data/x.mp4: Permission denied\n")


def test_a_full_disk_is_a_mistake():
    result = CliRunner().invoke(group_that_raises(OSError(28, "No space left on device")), ["go"])
    assert (result.exit_code, result.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("no file involved"), ValueError("ours")])
def test_a_bug_keeps_its_traceback(error):
    result = CliRunner().invoke(group_that_raises(error), ["go"])
    assert result.exception is error


def test_an_interrupt_says_how_to_go_on():
    result = CliRunner().invoke(group_that_raises(KeyboardInterrupt()), ["go"])
    assert result.exit_code == 130
    assert "run the same command again" in result.stderr


def test_a_user_error_is_a_value_error():
    with pytest.raises(ValueError, match="what"):
        raise UserError("what, where, what to do")


def test_a_prompt_is_normalised_as_the_prompts_of_training_are(afd, folder, monkeypatch):
    prompts = []
    monkeypatch.setattr("afd_train.generate.generate", lambda student, prompt, *rest: prompts.append(prompt))
    assert afd("generate", folder, "  a  red\tball ").exit_code == 0
    assert prompts == ["a red ball"]


def test_a_prompt_that_is_not_utf_8_is_a_mistake(afd, folder):
    result = afd("generate", folder, b"a r\xe9d ball".decode(errors="surrogateescape"))
    assert result.exit_code == 2
    assert "PROMPT: half a character" in result.stderr


def test_the_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "afd_cli", "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Usage: afd [OPTIONS] COMMAND")


def test_result_lines_name_both_sides_and_the_interval(tmp_path):
    row = {"metric": "perm", "better": "higher", "a": "ema", "b": "base", "n": 64, "mean_a": 0.9, "mean_b": 0.75}
    row |= {"delta": 0.15, "lo": 0.1, "hi": 0.2, "p": 0.001}
    (tmp_path / "results.json").write_text(json.dumps({"comparisons": [row | {"metric": "other"}, row]}))
    lines = importlib.import_module("afd_cli.stages").result_lines(tmp_path / "results.json", "perm")
    assert lines == [
        "perm (higher is better): ema 0.900, base 0.750, difference +0.150 [+0.100, +0.200], p 0.001",
    ]
