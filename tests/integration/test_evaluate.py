"""`afd eval` from a real cache and real (untrained) students to the files it leaves behind."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from afd_data.cache import cache_teacher
from afd_data.errors import UserError
from afd_data.prompts import load_prompts
from afd_data.teacher_config import PlaygroundConfig
from afd_data.teachers import open_teacher
from afd_train.config import Recipe
from afd_train.evaluation.evaluate import evaluate
from afd_train.recipe import load_recipe
from afd_train.runs import eval_folder, stream_folder, train_folder

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
RECIPE = """
out: {out}
video: {{width: 16, height: 16, frames: 4, fps: 8.0, lossless: true}}
prompts: {{source: {prompts}, test: 5, near_duplicate: 1.0}}
teacher: {{name: playground}}
cache: {{takes: 1, eval_takes: 2}}
student: {{dim: 24, heads: 2, layers: 1, ffn_dim: 32}}
eval: {{prompts: 4, clips_per_prompt: 2, resamples: 200, gallery_rows: 3}}
"""


def write_students(recipe: Recipe, seeds: dict[str, int]) -> None:
    from afd_train.students import new_student
    from afd_train.students.folder import save_student

    folder = train_folder(recipe) / "students"
    folder.mkdir(parents=True, exist_ok=True)
    for policy, seed in seeds.items():
        save_student(new_student(recipe.student, recipe.video, seed), folder / policy)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with cache, three students and a training log, evaluated once."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.txt").write_text("\n".join(f"A {colour} ball is dropped." for colour in COLOURS))
    (folder / "recipe.yaml").write_text(RECIPE.format(out=folder / "run", prompts=folder / "prompts.txt"))
    recipe = load_recipe(folder / "recipe.yaml")
    teacher = open_teacher(recipe.teacher)
    cache_teacher(recipe, load_prompts(recipe.prompts, folder, teacher), stream_folder(recipe), teacher, progress=False)
    write_students(recipe, {"base": 0, "student": 1, "ema": 2})
    log = [{"step": step, "student/loss": 1 / (step + 1)} for step in range(3)]
    (train_folder(recipe) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (train_folder(recipe) / "checkpoints" / "step-000003").mkdir(parents=True)
    assert evaluate(recipe) == eval_folder(recipe) / "report.html"
    return recipe


@pytest.fixture
def copy(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The evaluated run in a folder of the test's own."""
    shutil.copytree(recipe.out, tmp_path / "run")
    return recipe.model_copy(update={"out": str(tmp_path / "run")})


def results(recipe: Recipe) -> dict:
    return json.loads((eval_folder(recipe) / "results.json").read_text())


def made_at(recipe: Recipe, policy: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (eval_folder(recipe) / "videos" / policy).glob("*.mp4")}


def test_results_compare_every_policy_over_prompts(recipe):
    record = results(recipe)
    primary = {(found["a"], found["b"]): found for found in record["comparisons"] if found["primary"]}
    assert set(primary) == {("ema", "base"), ("student", "base"), ("teacher", "ema"), ("teacher", "base")}
    for found in primary.values():
        assert found["metric"] == "object_permanence"
        assert found["better"] == "higher"
        assert found["n"] == 4
        assert found["delta"] == pytest.approx(found["mean_a"] - found["mean_b"])
        assert found["lo"] <= found["delta"] <= found["hi"]
        assert 0 < found["p"] <= found["p_holm"] <= 1
    # Untrained students draw noise where the teacher draws its ball.
    assert primary["teacher", "base"]["delta"] > 0.5
    assert record["unit"] == "prompt"
    assert {"git commit", "seeds", "checkpoint base", "checkpoint ema", "date"} <= record["header"].keys()


def test_the_table_holds_a_row_a_video_and_metric(recipe):
    table = pyarrow.parquet.read_table(eval_folder(recipe) / "metrics.parquet")
    rows = table.select(["policy", "prompt_id", "take", "metric"]).to_pylist()
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    policies, metrics = {row["policy"] for row in rows}, {row["metric"] for row in rows}
    assert policies == {"teacher", "base", "student", "ema"}
    assert {"object_permanence", "warp_rmse_dis", "sharpness"} <= metrics
    assert len(rows) == 4 * 4 * 2 * len(metrics)  # policies x prompts x takes
    assert dict(zip(*(table.column(name).to_pylist() for name in ("policy", "step")), strict=True)) == {
        "teacher": -1,
        "base": 0,
        "student": 3,
        "ema": 3,
    }


def test_distances_between_distributions_and_the_share_of_motion_stand_in_the_results(recipe):
    record = results(recipe)
    cells = {(cell["metric"], cell["policy"]): cell for cell in record["cells"]}
    assert cells["motion_of_teacher", "teacher"]["mean"] == 1
    for name in ("w1_speed", "w1_gravity", "w1_restitution"):
        assert name in record["metrics"]
        assert (name, "ema") in cells or "ema" in record["skipped"][name]
    # Four frames of a dropped ball hold a speed in every video of the teacher.
    assert cells["w1_speed", "teacher"]["failed"] == 0


def test_the_teachers_first_takes_lie_beside_the_students_videos(recipe):
    names = sorted(made_at(recipe, "teacher"))
    assert len(names) == 4
    assert set(names) < made_at(recipe, "ema").keys()


def test_only_a_world_that_the_prompt_determines_has_trajectory_errors(copy):
    assert "trajectory_error" not in results(copy)["metrics"]
    evaluate(copy.model_copy(update={"teacher": PlaygroundConfig(determined=True)}))
    cells = {cell["policy"]: cell for cell in results(copy)["cells"] if cell["metric"] == "trajectory_error"}
    assert cells["teacher"]["mean"] < cells["ema"]["mean"] <= 24 / 2**0.5


def test_the_report_has_a_verdict_videos_and_curves(recipe):
    html = (eval_folder(recipe) / "report.html").read_text()
    assert 'class="verdict' in html
    assert html.count("<video") == 3
    assert "Training" in html
    assert "object permanence" in html


def test_the_same_command_again_keeps_the_videos_and_the_numbers(copy):
    before, numbers = made_at(copy, "ema"), results(copy)["comparisons"]
    evaluate(copy)
    assert made_at(copy, "ema") == before
    assert results(copy)["comparisons"] == numbers


def test_only_missing_videos_are_made_and_equal_the_lost_ones(copy):
    lost = sorted((eval_folder(copy) / "videos" / "student").glob("*.mp4"))[0]
    content, others = lost.read_bytes(), made_at(copy, "base")
    lost.unlink()
    evaluate(copy)
    assert lost.read_bytes() == content
    assert made_at(copy, "base") == others


def test_another_sampler_makes_the_videos_anew_with_its_steps(copy):
    def videos() -> list[bytes]:
        return [path.read_bytes() for path in sorted((eval_folder(copy) / "videos" / "ema").glob("*.mp4"))]

    one_step = videos()
    evaluate(copy.model_copy(update={"student": copy.student.model_copy(update={"steps": (1000, 500)})}))
    assert all(one != two for one, two in zip(one_step, videos(), strict=True))
    assert "steps [1000, 500] of 1000" in results(copy)["header"]["sampler"]


def test_another_checkpoint_makes_its_videos_anew(copy):
    before = {path.name: path.read_bytes() for path in (eval_folder(copy) / "videos" / "ema").glob("*.mp4")}
    write_students(copy, {"ema": 7})
    evaluate(copy)
    after = {path.name: path.read_bytes() for path in (eval_folder(copy) / "videos" / "ema").glob("*.mp4")}
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_a_missing_student_is_named_with_what_to_do(copy):
    shutil.rmtree(train_folder(copy) / "students" / "ema")
    with pytest.raises(UserError, match=r"students/ema: no student here; run `afd train` first"):
        evaluate(copy)


def test_a_split_without_videos_is_named_with_what_to_do(copy):
    config = copy.eval.model_copy(update={"split": "validation"})
    with pytest.raises(UserError, match=r"no videos of the validation split.*cache-teacher"):
        evaluate(copy.model_copy(update={"eval": config}))


def test_a_primary_metric_that_is_not_measured_lists_those_that_are(copy):
    config = copy.eval.model_copy(update={"primary_metric": "beauty"})
    with pytest.raises(UserError, match=r"'beauty' is not measured.*object_permanence"):
        evaluate(copy.model_copy(update={"eval": config}))


def test_a_damaged_teacher_video_is_named(copy):
    (tar,) = (stream_folder(copy) / "data" / "test").glob("*.tar")
    index = pyarrow.parquet.read_table(stream_folder(copy) / "index" / "test.parquet").to_pylist()
    damaged = bytearray(tar.read_bytes())
    for row in index:
        damaged[row["mp4_offset"] + row["mp4_size"] // 2] ^= 1
    tar.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match=r"\.mp4 is not what was sealed"):
        evaluate(copy)


def test_a_student_of_another_size_is_refused(copy):
    from afd_train.students import new_student
    from afd_train.students.folder import save_student

    video = copy.video.model_copy(update={"frames": 6})
    save_student(new_student(copy.student, video, seed=0), train_folder(copy) / "students" / "base")
    with pytest.raises(UserError, match=r"students/base: makes videos of .*6, 8\.0\), the recipe's are"):
        evaluate(copy)
