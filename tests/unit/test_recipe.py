"""Recipes: reading, inheriting, setting, and what is said about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from afd_data.errors import UserError
from afd_train.dry_run import recipe_text
from afd_train.objective_config import AfdConfig, DistilConfig, FlowMatchingConfig
from afd_train.recipe import load_recipe, read_recipe
from afd_train.shipped import shipped_recipes

BASE = """\
out: runs/a
prompts: {source: prompts.txt}
teacher: {name: playground}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file into the empty folder that the test runs in."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write_file


def message(name: str, *sets: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(name, sets)
    return str(caught.value)


def test_values_of_the_file_reach_the_recipe_and_the_rest_are_defaults(write):
    recipe = load_recipe(write("a.yaml", BASE + "seed: 3\ntrain: {learning_rate: 1e-4}\n"))
    assert (recipe.seed, recipe.train.learning_rate, recipe.video.width) == (3, 0.0001, 16)


def test_the_suffix_may_be_left_out(write):
    write("deep/a.yaml", BASE)
    assert load_recipe("deep/a").out == "runs/a"


def test_every_shipped_recipe_is_valid_and_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "folder" in shipped_recipes()
    for name in shipped_recipes():
        sets = [] if name == "seedance" or name.startswith(("quickstart", "miniature/")) else ["teacher.path=clips"]
        assert load_recipe(name, sets).out.startswith("runs/")


def test_a_file_here_goes_before_a_shipped_recipe_of_the_same_name(write):
    write("folder.yaml", BASE)
    assert load_recipe("folder").teacher.name == "playground"


def test_a_child_merges_into_its_parent_and_replaces_lists(write):
    write("parents/p.yaml", BASE + "student: {dim: 64, steps: [1000, 500]}\nseed: 1\n")
    recipe = load_recipe(write("c.yaml", "extends: parents/p\nstudent: {steps: [900]}\n"))
    assert (recipe.student.dim, recipe.student.steps, recipe.seed) == (64, (900,), 1)


def test_another_name_replaces_a_tagged_section(write):
    write("p.yaml", BASE + "train: {objective: {name: afd, policy_mix: 0.5}, steps: 7}\n")
    recipe = load_recipe(write("c.yaml", "extends: p\ntrain: {objective: {name: flow-matching}}\n"))
    assert recipe.train.objective == FlowMatchingConfig()
    assert recipe.train.steps == 7


def test_the_same_name_merges_a_tagged_section(write):
    write("p.yaml", BASE + "train: {objective: {policy_mix: 0.5}}\n")
    recipe = load_recipe(write("c.yaml", "extends: p\ntrain: {objective: {name: afd, prior_weight: 0.25}}\n"))
    assert recipe.train.objective == AfdConfig(policy_mix=0.5, prior_weight=0.25)


def test_a_tagged_section_without_a_name_means_its_default(write):
    recipe = load_recipe(write("a.yaml", BASE), ["train.objective.shuffled_advantages=true"])
    assert recipe.train.objective == AfdConfig(shuffled_advantages=True)


def test_sets_index_lists_and_replace_sections_in_any_order(write):
    name = write("a.yaml", BASE + "pretrain: [{steps: 3}, {objective: {name: distil}}]\n")
    sets = ["pretrain.1.steps=5", "teacher.path=clips", "teacher.name=folder", "pretrain.0.objective.name=distil"]
    recipe = load_recipe(name, sets)
    assert [run.steps for run in recipe.pretrain] == [3, 5]
    assert recipe.pretrain[0].objective == DistilConfig()
    assert recipe.teacher.name == "folder"


def test_prompts_are_relative_to_the_file_that_names_them_and_folders_to_where_afd_runs(write, tmp_path):
    write("far/p.yaml", BASE + "cache: {folder: cache}\n")
    recipe = load_recipe(write("near/c.yaml", "extends: ../far/p\n"))
    assert recipe.prompts.source == str(tmp_path / "far" / "prompts.txt")
    assert (recipe.out, recipe.cache.folder) == ("runs/a", "cache")


def test_prompts_given_with_set_are_relative_to_where_afd_runs(write, tmp_path):
    write("far/p.yaml", BASE)
    assert load_recipe("far/p", ["prompts.source=mine.txt"]).prompts.source == str(tmp_path / "mine.txt")


@pytest.mark.parametrize("source", ["teacher", "hf://datasets/owner/name", "/data/prompts.csv"])
def test_sources_that_are_no_relative_path_stay_as_they_are(write, source):
    text = BASE.replace("prompts.txt", source).replace("playground", "folder, path: clips")
    assert load_recipe(write("a.yaml", text)).prompts.source == source


def test_numbers_and_words_are_read_as_yaml_1_2_does(write):
    name = write("a.yaml", BASE + "train: {learning_rate: 2E-3, weight_decay: .5, seconds: ~}\nseed: 007\n")
    recipe = load_recipe(name)
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.seconds) == (0.002, 0.5, None)
    assert recipe.seed == 7


def test_the_printed_recipe_is_the_same_recipe(write):
    write("a.yaml", BASE + "pretrain: [{objective: {name: distil}}, {}]\nstudent: {steps: [1000, 250]}\n")
    loaded = read_recipe("a", ["train.seconds=2.5", 'out="runs/with: colon"'])
    assert load_recipe(write("printed.yaml", recipe_text(loaded))) == loaded.recipe


def test_the_printed_recipe_says_where_a_value_was_given(write):
    lines = recipe_text(read_recipe(write("a.yaml", BASE + "seed: 4\n"), ["train.steps=9"])).splitlines()
    assert "seed: 4  # a.yaml:4" in lines
    assert "  steps: 9  # --set" in lines


def test_a_misspelt_key_names_file_line_and_nearest_match(write):
    text = message(write("sub/a.yaml", BASE + "train:\n  learnig_rate: 1e-4\n"))
    assert text.startswith("sub/a.yaml:5: train.learnig_rate: unknown key. Did you mean learning_rate? Allowed here: ")


def test_a_key_of_another_section_is_shown_the_way(write):
    assert "Did you mean video.fps?" in message(write("a.yaml", BASE + "fps: 8\n"))


def test_all_problems_are_listed_at_once(write):
    text = message(write("a.yaml", BASE + "seed: x\nseed: 1\nvideo: {width: 7}\n"), "train.steps=0", "nonsense")
    assert text.splitlines()[0] == "5 problems in a.yaml:"
    for place in ("a.yaml:4: seed: expected", "a.yaml:5: seed: given twice", "a.yaml:6: video.width: expected"):
        assert f"  {place}" in text
    assert "  --set: train.steps: expected a number >= 1, got 0" in text


def test_a_line_belongs_to_the_file_of_the_chain_that_holds_it(write):
    write("p.yaml", BASE + "seed: -1\n")
    assert message(write("c.yaml", "extends: p\n\n\nvideo: {fps: 12}\n")).startswith(
        "p.yaml:4: seed: expected a number"
    )


def test_problems_inside_lists_and_unions_have_their_path(write):
    text = message(
        write("a.yaml", BASE + "pretrain:\n  - steps: 1\n  - objective:\n      name: distil\n      fake: 1\n")
    )
    assert text.startswith("a.yaml:8: pretrain.1.objective.fake: unknown key.")


def test_combinations_name_the_key_and_its_line(write):
    text = message(write("a.yaml", BASE + "video:\n  fps: 8\n  frames: 13\n"))
    assert text.startswith("a.yaml:6: video.frames: 13 is not divisible by student.chunk_frames")


def test_inheriting_in_a_circle_is_shown(write):
    write("a.yaml", "extends: b\n")
    write("b.yaml", "extends: a\n")
    assert message("a").endswith("a.yaml -> b.yaml -> a.yaml")


def test_what_yaml_cannot_read_is_told_once(write):
    assert message(write("a.yaml", BASE + "seed: !!int x\n")) == "a.yaml:4: seed: 'x' is not a whole number"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        BASE + "seed: " + "9" * 5000,
        BASE + 'seed: "\\ud800"',
        BASE + "? [a, b]\n: c",
        BASE + '"\\e[31m": 3',
        BASE + "<<: {seed: 1}",
        BASE + "pretrain: {}",
        BASE + "train: {objective: {name: [afd]}}",
        BASE + "student: {steps: [[1]]}",
        BASE + "student: {pixel_centre: [1, 2]}",
        'out: "\\0"',
        "extends: .",
        "extends: [a]",
        "%YAML 9.9\n---\nout: x",
        "\x07",
    ],
    ids=range(15),
)
def test_no_text_is_more_than_a_user_error(write, text):
    said = message(write("a.yaml", text))
    assert said.isprintable() or "\n" in said
    assert "a.yaml" in said


@pytest.mark.parametrize("text", ["name=x", "pretrain=5", "teacher.name=[1]", "out=a: b", "out='a", "train.steps.x=3"])
def test_no_set_is_more_than_a_user_error(write, text):
    assert "--set" in message(write("a.yaml", BASE), text)
