"""UMT5: embeddings bit for bit those of diffusers' pipeline, and clear words for a folder that is something else."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from afd_data.errors import UserError
from afd_train.student_config import StudentConfig
from afd_train.students.umt5 import Umt5, clean_prompt
from tests.tiny_wan import save_text_encoder

PROMPTS = ["a red ball", "", "the  ball\tfalls &amp;amp; bounces", "sch\u00c3\u00b6n", "ball " * 600, "\u7403 falls"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("umt5"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, for a test to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def umt5(folder: Path, tokens: int = 512, dim: int = 32, dtype: torch.dtype = torch.float32) -> Umt5:
    config = StudentConfig(text_encoder="umt5", text_encoder_path=str(folder), text_tokens=tokens, text_dim=dim)
    return Umt5(config, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_those_of_diffusers_at_512_tokens(folder, dtype):
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval(),
        vae=None,  # type: ignore[arg-type]
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    found = umt5(folder, dtype=dtype).encode(PROMPTS)
    assert found.shape == (6, 512, 32)
    assert found.dtype == torch.float32
    for row, prompt in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(prompt, None, False, max_sequence_length=512)
        assert torch.equal(row, expected[0].float())


def test_padding_is_zero_and_a_long_prompt_is_cut(folder):
    found = umt5(folder).encode(["a red ball", "ball " * 600])
    used = found.abs().sum(2) > 0
    assert used[0].tolist() == [True] * 4 + [False] * 508  # three words and the end
    assert used[1].all()


def test_a_prompt_does_not_depend_on_its_batch(folder):
    found = umt5(folder, tokens=16)
    assert torch.equal(found.encode(PROMPTS)[2:3], found.encode(PROMPTS[2:3]))


WHITE = "".join(chr(code) for code in range(sys.maxunicode) if chr(code).isspace())


@pytest.mark.parametrize(
    "text",
    [
        *PROMPTS,
        " a\n\n b ",
        f"x{WHITE}y",
        "&lt;b&gt;",
        "&amp;lt;",
        "\u201cquoted\u201d",
        "\ufb01re",
        "a\u200bb",
        "\x1b[0m",
    ]
    + [f"x{space}y" for space in WHITE],
)
def test_prompts_are_cleaned_as_diffusers_does(text):
    assert clean_prompt(text) == prompt_clean(text)


@pytest.mark.parametrize("held", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_is_used_under_whichever_name_the_file_has_it(folder, copy, held):
    expected = umt5(folder).encode(["a red ball"])
    path = copy / "text_encoder" / "model.safetensors"
    state = load_file(path)
    table = next(state.pop(name) for name in ("shared.weight", "encoder.embed_tokens.weight") if name in state)
    save_file(state | {held: table}, path, {"format": "pt"})
    about = json.loads((copy / "text_encoder" / "config.json").read_text())
    (copy / "text_encoder" / "config.json").write_text(json.dumps(about | {"tie_word_embeddings": False}))
    assert torch.equal(umt5(copy).encode(["a red ball"]), expected)


def test_a_released_encoder_leaves_the_memory(folder):
    found = umt5(folder)
    before = found.encode(["a red ball"])
    encoder = weakref.ref(found._loaded.encoder)  # type: ignore[union-attr]
    found.release()
    gc.collect()
    assert encoder() is None
    assert torch.equal(found.encode(["a red ball"]), before)


def test_the_identity_follows_from_all_that_changes_embeddings(folder, copy):
    identity = umt5(folder).identity
    assert umt5(copy).identity == identity
    assert umt5(folder, tokens=226).identity != identity
    assert umt5(folder, dtype=torch.bfloat16).identity != identity
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    assert umt5(copy).identity != identity


def test_another_width_names_the_recipes_key(folder):
    with pytest.raises(UserError, match=r"student\.text_dim: 64, .* gives 32\. Set student\.text_dim=32"):
        umt5(folder, dim=64).encode(["a"])


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"student\.text_encoder_path: .*text_encoder holds no config\.json"):
        umt5(tmp_path).identity  # noqa: B018


def test_an_encoder_of_another_kind_is_named(copy):
    (copy / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32}))
    with pytest.raises(UserError, match="holds a t5, not a umt5"):
        umt5(copy).encode(["a"])


def test_a_missing_tokenizer_is_named(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing"):
        umt5(copy).encode(["a"])


@pytest.mark.parametrize("content", ["", "{}", "<html>"])
def test_a_damaged_tokenizer_is_named(copy, content):
    (copy / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer is not a tokenizer"):
        umt5(copy).encode(["a"])


@pytest.mark.parametrize("name", ["encoder.final_layer_norm.weight", "shared.weight"])
def test_a_missing_tensor_is_named(copy, name):
    path = copy / "text_encoder" / "model.safetensors"
    state = load_file(path)
    if name == "shared.weight":
        state.pop("encoder.embed_tokens.weight", None)
    state.pop(name)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder lacks [12] tensors"):
        umt5(copy).encode(["a"])


def test_truncated_weights_are_named(copy):
    path = copy / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="text_encoder cannot be loaded"):
        umt5(copy).encode(["a"])


def test_pickled_weights_are_not_opened(copy):
    path = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    with pytest.raises(UserError, match="text_encoder cannot be loaded"):
        umt5(copy).encode(["a"])
