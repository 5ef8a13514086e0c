"""A student in the formats of other programs: bit for bit, whole or not at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file

from afd_data.config import PlaygroundConfig, PromptsConfig
from afd_data.errors import UserError
from afd_train.config import ExportConfig, LoraConfig, Recipe, StudentConfig, TrainConfig
from afd_train.export import export_all, export_student
from afd_train.runs import student_folder
from afd_train.students import Student
from afd_train.students.folder import open_student, save_adapter, save_student, starting_student
from tests.tiny_wan import RECORDED, RECORDED_STUDENT, RECORDED_VIDEO


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def state_of(student: Student) -> dict[str, torch.Tensor]:
    return dict(student.net.transformer.state_dict())


@pytest.fixture(params=["float32", "bfloat16"])
def wan(request, tmp_path) -> Path:
    """A student folder with the original weights of the fixture."""
    config = StudentConfig(**RECORDED_STUDENT, dtype=request.param)
    save_student(starting_student(config, RECORDED_VIDEO, 0, str(RECORDED)), tmp_path / "wan")
    return tmp_path / "wan"


@pytest.fixture
def lora(tiny_student, tmp_path) -> Path:
    """The folder of a student that is `base` beside it plus an adapter."""
    student: Student = tiny_student()
    save_student(student, tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 24, generator=generator), torch.randn(24, 2, generator=generator)
    state = {"blocks.0.attn1.to_q.lora_A.weight": down, "blocks.0.attn1.to_q.lora_B.weight": up}
    save_adapter(tmp_path / "lora", student, "../base", state, rank=2, alpha=4.0, targets=["to_q"])
    return tmp_path / "lora"


def test_original_weights_leave_as_they_came(tmp_path):
    save_student(
        starting_student(StudentConfig(**RECORDED_STUDENT), RECORDED_VIDEO, 0, str(RECORDED)), tmp_path / "wan"
    )
    path = export_student(tmp_path / "wan", tmp_path / "new" / "wan.pt", "original")
    content = torch.load(path, weights_only=True)
    wanted = {f"model.{name}": value for name, value in load_file(RECORDED).items()}
    assert list(content) == ["generator", "generator_ema"]
    assert same(content["generator"], wanted)
    assert same(content["generator_ema"], wanted)


def test_the_original_format_keeps_one_copy_of_the_weights(wan, tmp_path):
    path = export_student(wan, tmp_path / "wan.pt", "original")
    weights = sum(file.stat().st_size for file in wan.glob("transformer/*.safetensors"))
    assert path.stat().st_size < 1.5 * weights


def test_an_exported_original_starts_the_same_student(wan, tmp_path):
    opened = open_student(wan)
    path = export_student(wan, tmp_path / "wan.pt", "original")
    started = starting_student(opened.config, RECORDED_VIDEO, 0, str(path))
    assert same(state_of(started), state_of(opened))


def test_the_weights_survive_stock_diffusers(wan, tmp_path):
    opened = open_student(wan)
    stock = WanTransformer3DModel.from_pretrained(export_student(wan, tmp_path / "out", "diffusers"))
    stock.save_pretrained(tmp_path / "again")
    started = starting_student(opened.config, RECORDED_VIDEO, 0, str(tmp_path / "again"))
    assert same(state_of(started), state_of(opened))


def test_the_config_of_an_export_is_the_stock_one(wan, tmp_path):
    folder = export_student(wan, tmp_path / "out", "diffusers")
    stock = WanTransformer3DModel.from_pretrained(folder)
    stock.save_config(tmp_path / "stock")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "stock"))
    assert ours["_class_name"] == "WanTransformer3DModel"
    assert {key: value for key, value in ours.items() if key != "_name_or_path"} == {
        key: value for key, value in theirs.items() if key != "_name_or_path"
    }


def test_a_merged_student_needs_no_base_and_draws_the_same_video(lora, tmp_path):
    wanted = open_student(lora).videos([("id", "a red ball falls")], seed=0, takes=1)
    folder = export_student(lora, tmp_path / "elsewhere" / "merged", "merged")
    for path in (lora, tmp_path / "base"):
        path.rename(path.with_name(f"{path.name}-gone"))
    merged = open_student(folder)
    assert not (folder / "adapter").exists()
    assert (merged.videos([("id", "a red ball falls")], seed=0, takes=1) == wanted).all()


def test_a_merged_export_of_full_weights_is_the_same_student(wan, tmp_path):
    assert same(state_of(open_student(export_student(wan, tmp_path / "out", "merged"))), state_of(open_student(wan)))


@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_other_programs_get_the_merged_weights(lora, tmp_path, format):
    path = export_student(lora, tmp_path / "out.pt", format)
    opened = open_student(lora)
    assert same(state_of(starting_student(opened.config, opened.video, 0, str(path))), state_of(opened))


def test_the_lora_export_opens_in_peft_over_the_exported_base(lora, tmp_path):
    base = export_student(tmp_path / "base", tmp_path / "stock", "diffusers")
    folder = export_student(lora, tmp_path / "adapter", "lora")
    peft = PeftModel.from_pretrained(WanTransformer3DModel.from_pretrained(base), folder)
    found, wanted = peft.merge_and_unload().state_dict(), state_of(open_student(lora))
    assert found.keys() == wanted.keys()
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-6


def test_a_fully_trained_student_has_no_adapter(wan, tmp_path):
    with pytest.raises(UserError, match="all weights of this student were trained, so it has no adapter to export"):
        export_student(wan, tmp_path / "out", "lora")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prediction": "clean"}, "it has student.prediction clean"),
        ({"coordinates": True}, "it has student.coordinates"),
        ({"prediction": "clean", "coordinates": True}, "it has student.prediction clean and student.coordinates"),
    ],
)
def test_a_student_that_is_no_wan_is_refused_as_original_and_warned_of_as_diffusers(
    tiny_student, tmp_path, caplog, settings, said
):
    save_student(tiny_student(**settings), tmp_path / "odd")
    with pytest.raises(UserError, match=f"not a Wan, .*: {said}$"):
        export_student(tmp_path / "odd", tmp_path / "odd.pt", "original")
    with caplog.at_level(logging.WARNING, "afd_train"):
        stock = WanTransformer3DModel.from_pretrained(export_student(tmp_path / "odd", tmp_path / "out", "diffusers"))
    assert f"stock pipelines cannot sample this student, {said}" in caplog.text
    assert same(dict(stock.state_dict()), state_of(open_student(tmp_path / "odd")))


def test_the_original_format_is_a_pt_file(wan, tmp_path):
    with pytest.raises(UserError, match=r"the name of this format must end in \.pt"):
        export_student(wan, tmp_path / "out", "original")


@pytest.mark.parametrize("format", ["diffusers", "original", "lora", "merged"])
def test_what_is_there_already_is_never_replaced(lora, tmp_path, format):
    target = tmp_path / "mine.pt"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(UserError, match=r"mine\.pt: there already; name another place, or remove it"):
        export_student(lora, target, format)
    assert (target / "precious").exists()


@pytest.mark.parametrize("format", ["diffusers", "original", "lora", "merged"])
def test_a_failed_export_leaves_nothing(lora, tmp_path, format):
    (lora / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: not a readable safetensors file"):
        export_student(lora, tmp_path / "out.pt", format)
    assert sorted(tmp_path.rglob("*")) == before


def test_all_formats_of_a_recipe_are_written_below_its_out_and_written_again(lora, tmp_path):
    formats = ("diffusers", "original", "lora", "merged")
    recipe = Recipe(
        out=str(tmp_path / "run"),
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        train=TrainConfig(policy=LoraConfig()),
        export=ExportConfig(formats=formats, policy="student"),
    )
    source = student_folder(recipe, "student")
    source.parent.mkdir(parents=True)
    lora.rename(source)
    (tmp_path / "base").rename(source.parent / "base")
    for paths in (export_all(recipe), export_all(recipe)):
        assert paths == [tmp_path / "run/export" / name for name in ("diffusers", "original.pt", "lora", "merged")]
        assert all(path.exists() for path in paths)
        assert same(state_of(open_student(paths[3])), state_of(open_student(source)))


def test_a_fully_trained_recipe_cannot_ask_for_an_adapter():
    with pytest.raises(ValueError, match=r"export\.formats: lora needs train\.policy\.name=lora"):
        Recipe(out="x", prompts=PromptsConfig(source="unused.txt"), teacher=PlaygroundConfig(),
               export=ExportConfig(formats=("lora",)))  # fmt: skip
