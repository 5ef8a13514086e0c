"""`afd eval --compare` on runs that were really evaluated, to the three files it writes and the runs it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest

from afd_data.cache import cache_teacher
from afd_data.prompts import load_prompts
from afd_data.teachers import open_teacher
from afd_train.config import Recipe
from afd_train.evaluation.compare_runs import compare_runs
from afd_train.evaluation.evaluate import evaluate
from afd_train.recipe import load_recipe
from afd_train.runs import cache_folder, train_folder

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
RECIPE = """
out: {out}
seed: {seed}
video: {{width: 16, height: 16, frames: 4, fps: 8.0, lossless: true}}
prompts: {{source: {prompts}, test: 5, near_duplicate: 1.0}}
teacher: {{name: playground}}
cache: {{takes: 1, eval_takes: 2, folder: {cache}}}
student: {{dim: 24, heads: 2, layers: 1, ffn_dim: 32}}
eval: {{prompts: 4, clips_per_prompt: 1, resamples: 100, gallery_rows: 1, policies: [base, ema]}}
"""
RUNS = ("afd-0", "afd-1", "sft-0", "sft-1")


def evaluated(folder: Path, name: str, weights: int) -> Recipe:
    """A run called `name` whose adapted student has the random weights of a seed; all runs share cache and base."""
    from afd_train.students import new_student
    from afd_train.students.folder import save_student

    text = RECIPE.format(out=folder / name, seed=0, prompts=folder / "prompts.txt", cache=folder / "cache")
    (folder / f"{name}.yaml").write_text(text)
    recipe = load_recipe(folder / f"{name}.yaml")
    students = train_folder(recipe) / "students"
    students.mkdir(parents=True)
    for policy, seed in {"base": 0, "ema": weights}.items():
        save_student(new_student(recipe.student, recipe.video, seed), students / policy)
    lines = [{"step": step, "validation/motion": weights + step / 10} for step in range(3)]
    (train_folder(recipe) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(recipe)
    return recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each; sft's two are the same student, and so is the second of afd."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("\n".join(f"A {colour} ball is dropped." for colour in COLOURS))
    first = RECIPE.format(out=folder / "x", seed=0, prompts=folder / "prompts.txt", cache=folder / "cache")
    (folder / "cache.yaml").write_text(first)
    recipe = load_recipe(folder / "cache.yaml")
    teacher = open_teacher(recipe.teacher)
    cache_teacher(recipe, load_prompts(recipe.prompts, folder, teacher), cache_folder(recipe), teacher, progress=False)
    evaluated(folder, "afd-0", weights=1)
    evaluated(folder, "sft-0", weights=2)
    for copied in ("afd-1", "sft-1"):
        shutil.copytree(folder / "sft-0", folder / copied)
    return folder


@pytest.fixture(scope="module")
def compared(runs: Path) -> Path:
    """The folder of a comparison of all runs with sft."""
    compare_runs([runs / name for name in RUNS], runs / "out", "sft", resamples=200)
    return runs / "out"


def mean_of(run: Path, metric: str, policy: str = "ema") -> float:
    cells = json.loads((run / "eval" / "results.json").read_text())["cells"]
    return next(cell["mean"] for cell in cells if (cell["metric"], cell["policy"]) == (metric, policy))


def change(run: Path, target: Path, key: str, value: object) -> Path:
    """A copy of a run with another header."""
    shutil.copytree(run, target)
    path = target / "eval" / "results.json"
    record = json.loads(path.read_text())
    record["header"][key] = value
    path.write_text(json.dumps(record))
    return target


def test_seeds_of_a_method_are_averaged_and_compared_in_pairs(runs, compared):
    record = json.loads((compared / "compare.json").read_text())
    (found,) = [each for each in record["comparisons"] if each["metric"] == "sharpness"]
    afd, sft = ([mean_of(runs / f"{method}-{seed}", "sharpness") for seed in (0, 1)] for method in ("afd", "sft"))
    assert (found["a"], found["b"], found["n"]) == ("afd", "sft", 2)
    assert found["mean_a"] == pytest.approx(sum(afd) / 2)
    assert found["delta"] == pytest.approx(sum(afd) / 2 - sum(sft) / 2)
    # t of one degree of freedom at 97.5 % is 12.7062; the standard error of two is half of their distance.
    arm = 12.7062 * abs((afd[0] - sft[0]) - (afd[1] - sft[1])) / 2
    assert found["hi"] - found["delta"] == pytest.approx(arm, rel=1e-4)
    assert record["paired"] == {"afd": "2 seeds"}
    assert record["units"] == {"teacher": "4 prompts", "base": "4 prompts", "afd": "2 seeds", "sft": "2 seeds"}
    assert record["baseline"] == "sft"


def test_distances_between_sets_are_compared_over_seeds_too(runs, compared):
    record = json.loads((compared / "compare.json").read_text())
    (found,) = [each for each in record["comparisons"] if each["metric"] == "teacher_mmd"]
    means = [mean_of(runs / name, "teacher_mmd") for name in RUNS]
    assert found["delta"] == pytest.approx((means[0] + means[1] - means[2] - means[3]) / 2)


def test_the_page_shows_table_videos_forest_and_curves_and_runs_nothing(compared):
    html = (compared / "compare.html").read_text()
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//", html)
    assert html.count("<video") == 4
    assert html.count("<svg") == 2
    for text in ("afd", "sft", "2 seeds", "object permanence", "Validation while training"):
        assert text in html
    assert re.search(r"<b>A \w+ ball is dropped\.</b>", html)


def test_the_markdown_has_a_table_of_means_and_one_of_differences(compared):
    text = (compared / "compare.md").read_text()
    assert "| metric | teacher (4 prompts) | base (4 prompts) | afd (2 seeds) | sft (2 seeds) |" in text
    assert "| metric | afd (2 seeds) |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(widths) == {6, 3}


def test_single_runs_are_compared_over_prompts_with_their_own_base(runs, tmp_path):
    for old, new in (("afd-0", "afd"), ("sft-0", "sft")):
        shutil.copytree(runs / old, tmp_path / new)
    table = compare_runs([tmp_path / "afd", tmp_path / "sft"], tmp_path / "out", resamples=200)
    assert table.baseline == "base"
    assert table.paired == {"afd": "4 prompts", "sft": "4 prompts"}
    found = {(each.metric, each.a): each for each in table.summary.comparisons}
    record = json.loads((tmp_path / "afd" / "eval" / "results.json").read_text())
    (own,) = [
        each for each in record["comparisons"] if (each["metric"], each["a"], each["b"]) == ("sharpness", "ema", "base")
    ]
    assert found["sharpness", "afd"].delta == pytest.approx(own["delta"])
    assert found["sharpness", "afd"].p == own["p"]
    assert ("teacher_mmd", "afd") not in found  # a run keeps no features to resample


def test_the_command_prints_a_sentence_a_method_and_where_the_page_is(afd, runs, tmp_path):
    result = afd("eval", "--compare", runs / "afd-0", runs / "sft-0", "-o", tmp_path / "out", "--baseline", "sft")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("afd ")
    assert f"Comparison: {tmp_path / 'out' / 'compare.html'}" in result.stdout


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("noise seed", 7, r"another seed of the evaluation \(eval\.seed\)"),
        ("teacher's videos", "0" * 64, r"other videos of the teacher \(another cache\)"),
        ("prompts x clips", "4 x 8", "another number of prompts or of clips"),
    ],
)
def test_runs_that_were_evaluated_otherwise_are_refused(afd, runs, tmp_path, key, value, message):
    other = change(runs / "sft-0", tmp_path / "sft-0", key, value)
    result = afd("eval", "--compare", runs / "afd-0", other, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_other_prompts_are_refused_before_anything_else(afd, runs, tmp_path):
    recipe = load_recipe(runs / "sft-0.yaml")
    shutil.copytree(runs / "sft-0", tmp_path / "sft-0")
    fewer = recipe.eval.model_copy(update={"prompts": 3})
    evaluate(recipe.model_copy(update={"out": str(tmp_path / "sft-0"), "eval": fewer}))
    result = afd("eval", "--compare", runs / "afd-0", tmp_path / "sft-0")
    assert result.exit_code == 2
    assert re.search(r"other prompts than .*afd-0 \(3 in common of 3 and 4\)", result.stderr)


def mistakes(runs: Path, folder: Path) -> dict[str, tuple[list[object], str]]:
    """What a user may get wrong -> (arguments, what the message says)."""
    (folder / "empty").mkdir()
    shutil.copytree(runs / "afd-0", folder / "broken")
    (folder / "broken" / "eval" / "metrics.parquet").write_text("no table")
    shutil.copytree(runs / "afd-0", folder / "afd-0")
    shutil.copytree(runs / "afd-0", folder / "teacher")
    old = change(runs / "afd-0", folder / "old", "video", None)
    record = json.loads((old / "eval" / "results.json").read_text())
    del record["header"]["noise seed"]
    (old / "eval" / "results.json").write_text(json.dumps(record))
    afd, sft = runs / "afd-0", runs / "sft-1"
    return {
        "nothing there": ([afd, folder / "none"], "is no evaluated run"),
        "no eval folder": ([folder / "empty"], "is no evaluated run"),
        "damaged": ([folder / "broken"], "not the results of an evaluation"),
        "old": ([old], "did not record noise seed"),
        "same name": ([afd, folder / "afd-0"], "have the same name"),
        "reserved name": ([folder / "teacher"], "Rename the folder"),
        "unknown baseline": ([afd, "--baseline", "gan"], "no such method here. There are: base, afd"),
        "no seed in common": ([afd, runs / "afd-1", old.parent / "sft-5", "--baseline", "sft"], "no seed in common"),
        "with --set": ([afd, "--set", "seed=1"], "leave out --set"),
        "a file as output": ([afd, sft, "-o", runs / "prompts.txt"], "is a file"),
    }


def test_mistakes_end_in_one_message_and_exit_code_2(afd, runs, tmp_path):
    shutil.copytree(runs / "sft-0", tmp_path / "sft-5")
    for name, (arguments, message) in mistakes(runs, tmp_path).items():
        result = afd("eval", "--compare", "-o", tmp_path / "out", *arguments)
        assert result.exit_code == 2, name
        assert message in result.stderr, name
        assert result.stderr.startswith("error: "), name
        assert "Traceback" not in result.output, name


def test_two_recipes_and_options_of_compare_without_it_are_mistakes(afd):
    for arguments, message in ((["a", "b"], "add --compare"), (["a", "-o", "x"], "belong to --compare")):
        result = afd("eval", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
