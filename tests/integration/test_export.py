"""`afd export`: what other programs open, in a process of their own; and what the command refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from afd_train.recipe import load_recipe
from afd_train.runs import student_folder
from afd_train.students.folder import open_student, save_student

STOCK = """
import sys, torch
from diffusers import WanTransformer3DModel
transformer = WanTransformer3DModel.from_pretrained(sys.argv[1])
torch.save(transformer.state_dict(), sys.argv[2])
video, text = torch.zeros(1, 48, 2, 4, 4), torch.zeros(1, 6, 16)
assert transformer(video, torch.tensor([500.0]), text).sample.shape == video.shape
assert not [name for name in sys.modules if name.startswith("afd")], "afd was imported"
"""


@pytest.mark.slow  # imports diffusers in a new process
def test_stock_diffusers_opens_an_export_in_a_process_without_afd(afd, student, tmp_path):
    result = afd("export", student, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {tmp_path / 'out'}\n"
    command = [sys.executable, "-c", STOCK, str(tmp_path / "out"), str(tmp_path / "state.pt")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found, wanted = torch.load(tmp_path / "state.pt"), open_student(student).net.transformer.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("format", ["diffusers", "original", "merged"])
def test_the_command_writes_every_format(afd, student, tmp_path, format):
    result = afd("export", student, tmp_path / "out.pt", "--format", format)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.pt").is_dir() == (format != "original")


def test_the_student_of_a_trained_recipe_is_found_by_the_name_of_the_recipe(afd, student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("out: run\nprompts: {source: p.txt}\nteacher: {name: playground}\n")
    missing = afd("export", "mine", "out")
    assert missing.exit_code == 2
    assert "run/train/students/ema: no student here (student.json is missing)" in missing.stderr
    save_student(open_student(student), tmp_path / student_folder(load_recipe("mine")))
    assert afd("export", "mine", "out").exit_code == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{student}", "{tmp}/out", "--format", "lora"], "all weights of this student were trained"),
        (["{student}", "{tmp}/out", "--format", "original"], "the name of this format must end in .pt"),
        (["{student}", "{tmp}"], "there already; name another place, or remove it"),
        (["{student}", "{tmp}/out", "--format", "onnx"], "'onnx' is not one of 'diffusers', 'original', 'lora'"),
        (["{tmp}", "{tmp}/out"], "no student here (student.json is missing)"),
        (["no-such-recipe", "{tmp}/out"], "no-such-recipe"),
        (["{student}"], "Missing argument 'OUTPUT'"),
    ],
)
def test_a_mistake_ends_in_a_message_and_exit_code_2(afd, student, tmp_path, arguments, said):
    result = afd("export", *(argument.format(student=student, tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_student_ends_in_a_message_and_exit_code_2(afd, student, tmp_path):
    save_student(open_student(student), tmp_path / "student")
    weights = tmp_path / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    result = afd("export", tmp_path / "student", tmp_path / "out", "--format", "merged")
    assert result.exit_code == 2
    assert "not a readable safetensors file" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_says_who_opens_what(afd):
    text = afd("export", "--help").stdout
    for name in ("WanTransformer3DModel.from_pretrained", "Self-Forcing", "PeftModel.from_pretrained"):
        assert name in text
    assert "    afd export quickstart " in text
