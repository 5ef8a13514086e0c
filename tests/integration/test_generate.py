"""`afd generate`: from a student folder and a prompt to an mp4, chunk by chunk."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from afd_data.errors import UserError
from afd_data.prompts import prompt_id
from afd_data.video import probe, read_video
from afd_train.generate import generate
from afd_train.students import Student, new_student
from afd_train.students.folder import open_student, save_student

PROMPT = "A red ball is dropped."


def whole(student: Path, seed: int) -> np.ndarray:
    """The clip as evaluation draws it."""
    opened: Student = open_student(student)
    return opened.videos([(prompt_id(PROMPT), PROMPT)], seed, takes=1)[0, 0]


def frames(path: Path) -> np.ndarray:
    return read_video(path).frames


def test_the_video_is_the_clip_that_evaluation_draws(student, tmp_path):
    assert generate(student, PROMPT, tmp_path / "ball.mp4", seed=3) == 4
    assert np.array_equal(frames(tmp_path / "ball.mp4"), whole(student, seed=3))
    assert probe(tmp_path / "ball.mp4").fps == 8


def test_a_longer_video_starts_with_the_clip(student, tmp_path):
    heard = []
    assert generate(student, PROMPT, tmp_path / "ball.mp4", seed=3, chunks=5, progress=heard.append) == 10
    assert heard == [2, 4, 6, 8, 10]
    found = frames(tmp_path / "ball.mp4")
    assert found.shape == (10, 16, 16, 3)
    assert np.array_equal(found[:4], whole(student, seed=3))


def test_the_same_call_gives_the_same_file(student, tmp_path):
    contents = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate(student, PROMPT, tmp_path / f"{name}.mp4", seed)
        contents.append((tmp_path / f"{name}.mp4").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_another_spelling_of_the_prompt_is_the_same_prompt_to_the_student(student, tmp_path):
    generate(student, "  a RED ball\tis dropped. ", tmp_path / "ball.mp4")
    assert probe(tmp_path / "ball.mp4").frames == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("student.json", r"no student here \(student\.json is missing\)"),
        ("transformer/diffusion_pytorch_model.safetensors", "the weights are missing"),
    ],
)
def test_an_incomplete_student_folder_is_named(student, tmp_path, damage, message):
    shutil.copytree(student, tmp_path / "ema")
    (tmp_path / "ema" / damage).unlink()
    with pytest.raises(UserError, match=message):
        generate(tmp_path / "ema", PROMPT, tmp_path / "ball.mp4")
    assert not (tmp_path / "ball.mp4").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, "half"])
def test_unreadable_weights_are_named(student, tmp_path, content):
    shutil.copytree(student, tmp_path / "ema")
    weights = tmp_path / "ema" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content == "half" else content)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors: not a readable safetensors file"):
        generate(tmp_path / "ema", PROMPT, tmp_path / "ball.mp4")


def test_weights_of_another_student_are_named(tiny_recipe, student, tmp_path):
    other = tiny_recipe(tmp_path, student={"layers": 2})
    save_student(new_student(other.student, other.video, seed=0), tmp_path / "other")
    shutil.copytree(student, tmp_path / "ema")
    shutil.rmtree(tmp_path / "ema" / "transformer")
    shutil.copytree(tmp_path / "other" / "transformer", tmp_path / "ema" / "transformer")
    with pytest.raises(UserError, match=r"transformer/ has layers 2 \(the recipe: 1\)"):
        generate(tmp_path / "ema", PROMPT, tmp_path / "ball.mp4")


def test_a_later_format_is_refused(student, tmp_path):
    shutil.copytree(student, tmp_path / "ema")
    about = tmp_path / "ema" / "student.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2, this afd reads 1"):
        generate(tmp_path / "ema", PROMPT, tmp_path / "ball.mp4")


def test_a_frame_wise_student_goes_on_from_a_picture(tiny_recipe, afd, tmp_path):
    recipe = tiny_recipe(tmp_path, student={"chunk_frames": 1, "pixel_scale": 1.0})
    save_student(new_student(recipe.student, recipe.video, seed=0), tmp_path / "student")
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "first.png")
    arguments = ("generate", tmp_path / "student", PROMPT, "-o")
    assert afd(*arguments, tmp_path / "on.mp4", "--image", tmp_path / "first.png").exit_code == 0
    assert afd(*arguments, tmp_path / "alone.mp4").exit_code == 0
    on, alone = frames(tmp_path / "on.mp4"), frames(tmp_path / "alone.mp4")
    assert on.shape == alone.shape == (4, 16, 16, 3)
    assert np.array_equal(on[0], picture)  # the cache's format is lossless
    assert not np.array_equal(on[1:], alone[:3])  # the same noise, but they have seen the picture


def test_a_chunk_wise_student_says_that_one_picture_is_no_chunk(student, afd, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "first.png")
    result = afd("generate", student, PROMPT, "-o", tmp_path / "on.mp4", "--image", tmp_path / "first.png")
    assert result.exit_code == 2
    assert "draws 2 latent frames together" in result.stderr
    assert not (tmp_path / "on.mp4").exists()


def test_a_file_that_is_no_picture_is_named(student, afd, tmp_path):
    (tmp_path / "first.png").write_text("no picture")
    result = afd("generate", student, PROMPT, "--image", tmp_path / "first.png", "-o", tmp_path / "on.mp4")
    assert result.exit_code == 2
    assert "first.png: not a picture" in result.stderr
