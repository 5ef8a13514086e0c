"""`afd push-student` against a Hub on this machine, with the real client on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from afd_data.errors import UserError
from afd_data.sample import parse_sample
from afd_data.shards import Content, Manifest, read_manifest, read_member, scan_shard, write_manifest, write_shard
from afd_train.config import EvalConfig, Recipe
from afd_train.publish import prepared, push_student
from afd_train.recipe import load_recipe
from afd_train.runs import eval_folder, student_folder, train_folder
from afd_train.students import new_student
from afd_train.students.folder import open_student, save_adapter, save_student
from tests.hub_server import HubServer, connect

SMALL_EVAL = EvalConfig(split="validation", prompts=3, clips_per_prompt=1, resamples=100, gallery_rows=1)
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def evaluated(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with untrained students, a log of training, and an evaluation on 3 prompts."""
    from afd_train.evaluation.evaluate import evaluate

    recipe = tiny_recipe(tmp_path_factory.mktemp("run") / "out", eval=SMALL_EVAL)
    for seed, policy in enumerate(("base", "student", "ema")):
        save_student(new_student(recipe.student, recipe.video, seed), student_folder(recipe, policy))
    (train_folder(recipe) / "metrics.jsonl").write_text('{"step": 0, "student/loss": 1.0}\n')
    evaluate(recipe)
    return recipe


@pytest.fixture
def recipe(evaluated: Recipe, tmp_path: Path) -> Recipe:
    """The evaluated run in a folder of the test's own."""
    shutil.copytree(evaluated.out, tmp_path / "private" / "run")
    return evaluated.model_copy(update={"out": str(tmp_path / "private" / "run")})


@pytest.fixture
def push(recipe: Recipe) -> Callable[..., str]:
    """Publish the run's student as alice/tiny."""

    def run(repo: str = "alice/tiny", **options: Any) -> str:
        settings: dict[str, Any] = {"recipe": recipe, **options}
        return push_student(student_folder(recipe), repo, **settings)

    return run


def with_terms(source: Path, target: Path, **changes: str) -> Path:
    """A copy of the cache's first training videos whose samples say something else; the first keeps what it says."""
    shard = read_manifest(source).of("train")[0]
    contents = []
    with open(source / shard.file, "rb") as file:
        for entry in scan_shard(source / shard.file)[:3]:
            sample = parse_sample(read_member(file, entry, "json"), entry.key)
            record = (replace(sample, **changes) if contents else sample).to_json()
            contents.append(Content(entry.key, entry.created_at, read_member(file, entry, "mp4"), record))
    target.mkdir()
    write_manifest(target, Manifest().with_shard(write_shard(target, shard.file, contents)))
    return target


def reading(recipe: Recipe, cache: Path) -> Recipe:
    return recipe.model_copy(update={"stream": recipe.stream.model_copy(update={"folder": str(cache)})})


def commits(hub: HubServer) -> int:
    return len(hub.repos["models", "alice/tiny"].commits)


def head_of(hub: HubServer) -> ModelCardData:
    data = ModelCard(hub.files("alice/tiny")["README.md"].decode()).data
    assert isinstance(data, ModelCardData)
    return data


def test_a_pushed_student_opens_again_from_its_address(hub, push, recipe):
    assert push() == f"{hub.url}/alice/tiny"
    weights = open_student(student_folder(recipe)).net.state_dict()
    again = open_student("hf://alice/tiny")
    assert again.config == open_student(student_folder(recipe)).config
    assert all(torch.equal(value, weights[name]) for name, value in again.net.state_dict().items())


def test_stock_diffusers_opens_the_repository(hub, push, recipe):
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    push()
    stock = WanTransformer3DModel.from_pretrained("alice/tiny", subfolder="transformer")
    weights = open_student(student_folder(recipe)).net.transformer.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in stock.state_dict().items())


def test_a_video_is_generated_from_the_hub(hub, push, afd, tmp_path):
    push()
    result = afd("generate", "hf://alice/tiny", "A red ball is dropped.", "-o", tmp_path / "ball.mp4")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "ball.mp4").stat().st_size > 0


def test_the_repository_holds_the_student_its_recipe_metrics_and_samples(hub, push):
    push()
    names = set(hub.files("alice/tiny"))
    samples = {name for name in names if name.startswith("samples/")}
    assert len(samples) == 3
    assert names - samples == {".gitattributes", "README.md", "student.json", "recipe.yaml", "transformer/config.json",
                               TRANSFORMER, "eval/results.json", "train/metrics.jsonl"}  # fmt: skip


def test_the_head_of_the_card_gives_the_results(hub, push, recipe):
    push(licence="Apache-2.0")
    head = head_of(hub)
    assert (head.license, head.library_name, head.pipeline_tag) == ("apache-2.0", "diffusers", "text-to-video")
    cells = json.loads((eval_folder(recipe) / "results.json").read_text())["cells"]
    wanted = {cell["metric"]: round(cell["mean"], 6) for cell in cells if cell["policy"] == "ema"}
    assert {result.metric_type: result.metric_value for result in head.eval_results or []} == wanted


def test_the_card_tells_teacher_terms_and_data(hub, push):
    push()
    card = hub.files("alice/tiny")["README.md"].decode()
    assert "Teacher: playground, version 1, 16 videos" in card
    assert "distillation under its terms: allowed" in card
    assert "| train | 12 | 12 |" in card
    assert "| validation | 4 | 4 |" in card
    assert "afd generate hf://alice/tiny" in card
    assert f'src="{hub.url}/alice/tiny/resolve/main/samples/' in card


def test_a_licence_of_ones_own_has_a_name(hub, push):
    push(licence="My Licence 1.0")
    head = head_of(hub)
    assert (head.license, head.license_name) == ("other", "my-licence-1.0")


def test_released_weights_are_named_as_the_base(hub, recipe, tmp_path):
    config = recipe.student.model_copy(update={"init": "hf://gdhe17/Self-Forcing/checkpoints/x.pt"})
    save_student(new_student(config, recipe.video, 0), tmp_path / "student")
    push_student(tmp_path / "student", "alice/tiny", recipe=None, accept_unknown_terms=True)
    assert head_of(hub).base_model == "gdhe17/Self-Forcing"
    assert "whose licence applies as well" in hub.files("alice/tiny")["README.md"].decode()


def test_no_path_of_the_machine_is_published(hub, recipe, tmp_path):
    config = recipe.student.model_copy(update={"init": f"{tmp_path}/private/weights.pt"})
    save_student(new_student(config, recipe.video, 0), tmp_path / "student")
    changed = recipe.model_copy(
        update={"student": config, "prompts": recipe.prompts.model_copy(update={"source": "/home/me/my prompts.txt"})}
    )
    push_student(tmp_path / "student", "alice/tiny", recipe=changed)
    for name, content in hub.files("alice/tiny").items():
        if not name.endswith((".mp4", ".safetensors")):
            assert str(tmp_path).encode() not in content, name
            assert b"/home/me" not in content, name
    assert b'source: "my prompts.txt"' in hub.files("alice/tiny")["recipe.yaml"]


def test_the_published_recipe_is_read_again(hub, push, recipe, tmp_path):
    push()
    (tmp_path / "again.yaml").write_bytes(hub.files("alice/tiny")["recipe.yaml"])
    again = load_recipe(tmp_path / "again.yaml")
    assert again.out == "run"
    assert (again.train, again.student, again.eval) == (recipe.train, recipe.student, recipe.eval)


def test_pushing_the_same_again_sends_nothing(hub, push):
    push()
    count, before = commits(hub), hub.repos["models", "alice/tiny"].branches["main"]
    hub.requests.clear()
    push()
    assert (commits(hub), hub.repos["models", "alice/tiny"].branches["main"]) == (count, before)
    assert not [line for line in hub.requests if line.startswith("PUT") or "/commit/" in line]


def test_only_what_changed_is_sent(hub, push, recipe):
    push()
    weights = hub.files("alice/tiny")[TRANSFORMER]
    with open(train_folder(recipe) / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "student/loss": 0.5}\n')
    hub.requests.clear()
    push()
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert hub.files("alice/tiny")["train/metrics.jsonl"].count(b"\n") == 2
    assert hub.files("alice/tiny")[TRANSFORMER] == weights


def test_samples_of_an_earlier_push_are_taken_away_and_other_files_stay(hub, push, recipe):
    push()
    hub.add("alice/tiny", {"notes.txt": b"mine", "samples/notes.txt": b"mine"})
    gone = sorted((eval_folder(recipe) / "videos" / "ema").glob("*.mp4"))[0]
    gone.unlink()
    push()
    names = set(hub.files("alice/tiny"))
    assert f"samples/{gone.name}" not in names
    assert {"notes.txt", "samples/notes.txt"} <= names


@pytest.mark.parametrize("step", ["preupload", "objects/batch", "/commit/"])
def test_an_interrupted_push_leaves_the_repository_as_it_was(hub, push, recipe, step):
    push()
    before = hub.files("alice/tiny")
    save_student(new_student(recipe.student, recipe.video, 9), student_folder(recipe))
    hub.fail[step] = 400
    with pytest.raises(UserError, match="alice/tiny"):
        push()
    assert hub.files("alice/tiny") == before
    hub.fail.clear()
    push()
    assert hub.files("alice/tiny")[TRANSFORMER] != before[TRANSFORMER]


def test_results_of_another_student_are_left_out(hub, push, recipe, caplog):
    save_student(new_student(recipe.student, recipe.video, 9), student_folder(recipe))
    push()
    assert "eval/results.json" not in hub.files("alice/tiny")
    assert head_of(hub).eval_results is None
    assert "does not measure the student as it is now" in caplog.text


def test_a_lora_student_is_published_merged_with_its_adapter(hub, recipe, tmp_path):
    base, layer = new_student(recipe.student, recipe.video, 0), "blocks.0.ffn.net.2"
    save_student(base, tmp_path / "base")
    weight = base.net.transformer.state_dict()[f"{layer}.weight"]
    state = {f"{layer}.lora_A.weight": torch.ones(2, weight.shape[1]),
             f"{layer}.lora_B.weight": torch.ones(weight.shape[0], 2)}  # fmt: skip
    save_adapter(tmp_path / "lora", base, "../base", state, rank=2, alpha=4.0, targets=["ffn.net.2"])
    push_student(tmp_path / "lora", "alice/tiny", recipe=None, accept_unknown_terms=True)
    shutil.rmtree(tmp_path / "base")
    again = open_student("hf://alice/tiny").net.transformer.state_dict()
    torch.testing.assert_close(again[f"{layer}.weight"], weight + 4.0)  # (alpha / rank) B A = 2 (1 + 1)
    names = set(hub.files("alice/tiny"))
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", TRANSFORMER} <= names


def test_videos_whose_terms_forbid_it_are_never_asked_about(hub, push, recipe, playground_cache, tmp_path):
    cache = with_terms(playground_cache, tmp_path / "cache", distillation="disallowed")
    with pytest.raises(UserError, match="do not allow distillation"):
        push(recipe=reading(recipe, cache), accept_unknown_terms=True)
    assert hub.requests == []


def test_unknown_terms_have_to_be_accepted(hub, push, recipe, playground_cache, tmp_path, caplog):
    unknown = reading(recipe, with_terms(playground_cache, tmp_path / "cache", distillation="unknown"))
    with pytest.raises(UserError, match="--accept-unknown-terms"):
        push(recipe=unknown)
    assert hub.requests == []
    push(recipe=unknown, accept_unknown_terms=True)
    assert "terms of the teacher's videos are unknown" in caplog.text
    assert "distillation under its terms: unknown" in hub.files("alice/tiny")["README.md"].decode()


def test_a_run_without_its_cache_has_unknown_terms(hub, push, recipe, tmp_path):
    with pytest.raises(UserError, match="unknown"):
        push(recipe=reading(recipe, tmp_path / "gone"))


def test_words_of_strangers_are_no_markup(recipe, playground_cache, tmp_path):
    cache = with_terms(playground_cache, tmp_path / "cache", teacher="<b>x</b> [y](http://z)", licence="a|`b`\n# c")
    with prepared(student_folder(recipe), "a/b", recipe=reading(recipe, cache)) as found:
        assert r"\<b\>x\</b\> \[y\]\(http://z\)" in found.card
        assert r"a\|\`b\` \# c" in found.card


def test_a_private_repository_is_made(hub, push):
    push(private=True)
    assert hub.repos["models", "alice/tiny"].private


def test_a_public_repository_is_not_taken_for_a_private_one(hub, push):
    hub.add("alice/tiny", {"x.txt": b""})
    with pytest.raises(UserError, match="is there and public"):
        push(private=True)
    assert commits(hub) == 1


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "alice/tiny", "no token for the Hub: run `hf auth login`"),
        ("hf_wrong", "alice/tiny", "the Hub does not know your token"),
        ("hf_token_of_alice", "bob/tiny", "your token may not write there"),
        ("hf_token_of_alice", "bob/public", "your token may not write there"),
        ("hf_token_of_alice", "alice", "not the name of a repository"),
        ("hf_token_of_alice", "alice/a b", "not the name of a repository"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, push, tmp_path, monkeypatch, token, repo, message):
    hub.add("bob/public", {"x.txt": b""})
    connect(hub.url, tmp_path / "home", monkeypatch, token)
    with pytest.raises(UserError) as error:
        push(repo)
    assert message in str(error.value)
    assert "hf_token_of_alice" not in str(error.value)
    assert "hf_wrong" not in str(error.value)


def test_a_hub_that_does_not_answer_is_said(push, tmp_path, monkeypatch):
    connect("http://127.0.0.1:9", tmp_path / "home", monkeypatch)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        push()


def test_a_token_in_a_file_is_not_sent(hub, push, recipe):
    (train_folder(recipe) / "metrics.jsonl").write_text('{"note": "hf_token_of_alice"}\n')
    with pytest.raises(UserError, match=r"train/metrics.jsonl: has your token") as error:
        push()
    assert "hf_token_of_alice" not in str(error.value)
    assert hub.requests == []


def test_only_a_student_is_pushed(hub, tmp_path):
    with pytest.raises(UserError, match="no student here"):
        push_student(tmp_path, "alice/tiny", recipe=None, accept_unknown_terms=True)


def test_the_command_pushes_a_folder_and_says_where(hub, afd, recipe):
    folder = student_folder(recipe)
    result = afd("push-student", "alice/tiny", folder)
    assert result.exit_code == 2
    assert "--accept-unknown-terms" in result.stderr
    result = afd("push-student", "alice/tiny", folder, "--accept-unknown-terms", "--private")
    assert result.exit_code == 0, result.output
    assert f"Published {hub.url}/alice/tiny" in result.stdout
    assert hub.repos["models", "alice/tiny"].private


def test_a_dry_run_prints_files_and_card_and_sends_nothing(hub, afd, recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(exclude_none=True))
    result = afd("push-student", "alice/tiny", tmp_path / "recipe.yaml", "--dry-run", "--licence", "mit")
    assert result.exit_code == 0, result.output
    size = (student_folder(recipe) / TRANSFORMER).stat().st_size
    assert f"{size:,}  {TRANSFORMER}" in result.stdout
    assert "license: mit" in result.stdout
    assert hub.requests == []
