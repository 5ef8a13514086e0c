"""Weights into students: every kind of file, folders, adapters, and what is said about those that do not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from afd_data.errors import UserError
from afd_train.student_config import StudentConfig
from afd_train.students import Student, checkpoints, new_student, new_transformer
from afd_train.students.checkpoints import load_weights, read_weights, write_weights
from afd_train.students.folder import open_student, save_adapter, save_student, starting_student
from afd_train.students.keys import to_diffusers, to_original
from tests.tiny_wan import RECORDED, RECORDED_STUDENT, RECORDED_VIDEO

QUERY = "blocks.0.attn1.to_q.weight"
ALL = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


@pytest.fixture
def original() -> dict[str, torch.Tensor]:
    return load_file(RECORDED)


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def state_of(student: Student) -> dict[str, torch.Tensor]:
    return dict(student.net.transformer.state_dict())


def wan(**settings: Any) -> StudentConfig:
    return StudentConfig(**{**RECORDED_STUDENT, **settings})


def changed(config: StudentConfig, **settings: Any) -> StudentConfig:
    return StudentConfig(**{**config.model_dump(), **settings})


def prefixed(state, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


# Files


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "model._fsdp_wrapped_module.",
        "model.diffusion_model.",
        "_orig_mod.model.",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module._checkpoint_wrapped_module.",
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_prefixes_of_wrappers_are_taken_off(original, tmp_path, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(prefixed(original, prefix), path)
    assert same(read_weights(path, None, "student.init"), to_diffusers(original))


def test_a_wrapper_inside_a_name_is_taken_off_too(original, tmp_path):
    state = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for name, v in original.items()}
    torch.save({"generator": state}, tmp_path / "a.pt")
    assert same(read_weights(tmp_path / "a.pt", None, "student.init"), to_diffusers(original))


def test_diffusers_names_are_read_as_they_are(original, tmp_path):
    torch.save({"model": to_diffusers(original)}, tmp_path / "a.pt")
    assert same(read_weights(tmp_path / "a.pt", None, "student.init"), to_diffusers(original))


@pytest.mark.parametrize(
    ("there", "key", "chosen"),
    [
        (("generator", "generator_ema", "critic"), None, "generator_ema"),
        (("generator", "generator_ema", "critic"), "generator", "generator"),
        (("generator", "critic"), None, "generator"),
        (("model", "critic"), None, "model"),
    ],
)
def test_the_averaged_network_is_taken_unless_a_key_says_otherwise(original, tmp_path, there, key, chosen):
    torch.save({name: {k: v + i for k, v in original.items()} for i, name in enumerate(there)}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt", key, "student.init")
    assert torch.equal(found["proj_out.bias"], original["head.head.bias"] + there.index(chosen))


def test_a_file_in_the_old_format_of_torch_is_read(original, tmp_path):
    torch.save(original, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "a.pt", None, "student.init"), to_diffusers(original))


def test_weights_keep_their_precision(original, tmp_path):
    torch.save({name: value.bfloat16() for name, value in original.items()}, tmp_path / "a.pt")
    assert {value.dtype for value in read_weights(tmp_path / "a.pt", None, "x").values()} == {torch.bfloat16}


class Code:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"generator": Code(tmp_path / "ran")}, protocol=2))
    torch.save({"generator": Code(tmp_path / "ran")}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=rf"student\.init: .*{name}: not a .*checkpoint"):
            read_weights(tmp_path / name, None, "student.init")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x80", b"\x00" * 64, "short", "half"])
def test_a_damaged_file_is_named(original, tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(original, path)
    whole = path.read_bytes()
    cut = {"short": whole[:-1], "half": whole[: len(whole) // 2]}
    path.write_bytes(cut[content] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=rf"student\.init: .*weights{suffix}: (not a |damaged, or)"):
        read_weights(path, None, "student.init")


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ([torch.zeros(1)], None, "holds a list, not a dict of tensors"),
        ({"generator": {}, "critic": {}}, "generator_ema", "has no 'generator_ema'; keys there are: generator, critic"),
        ({"generator": 3}, "generator", "'generator' is a int, not a dict of tensors"),
        ({"step": 1, "ema": {}}, None, "none of generator_ema, generator, model in it, but step, ema"),
        ({"step": 1}, None, "'step' is a int, not a tensor"),
        ({"generator": {}}, None, "not the weights of a Wan transformer: nothing in it"),
        ({"layer.weight": torch.zeros(1)}, None, "not the weights of a Wan transformer: layer.weight"),
        ({1: torch.zeros(1)}, None, "1 is a Tensor"),
        ({"head.head.bias": torch.zeros(1, dtype=torch.int8)}, None, "head.head.bias is int8, strided, cpu"),
        ({"head.head.bias": torch.zeros(1, device="meta")}, None, "head.head.bias is float32, strided, meta"),
        ({"head.head.bias": torch.zeros(1).to_sparse()}, None, "head.head.bias is float32, sparse_coo, cpu"),
        (
            {"head.head.bias": torch.zeros(1), "model.head.head.bias": torch.zeros(1)},
            None,
            "head.head.bias is there twice, once as model.head.head.bias",
        ),
        (
            {"head.head.bias": torch.zeros(1), "img_emb.proj.0.weight": torch.zeros(1)},
            None,
            "1 of 2 names are unknown to original Wan: img_emb.proj.0.weight",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_described(tmp_path, content, key, said):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "a.pt", key, "student.init")
    assert said in str(error.value)


@pytest.mark.parametrize(("name", "said"), [("a.pt", "there is no such file"), ("a.zip", "not a .pt, .pth or .safe")])
def test_a_path_that_holds_no_weights_is_named(tmp_path, name, said):
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=f"student.init: .*{said}"):
        read_weights(tmp_path / name, None, "student.init")


def test_weights_come_from_the_hub(original, hub, tmp_path):
    torch.save({"generator_ema": original}, tmp_path / "a.pt")
    hub.add("alice/model", {"checkpoints/a.pt": (tmp_path / "a.pt").read_bytes()})
    found = read_weights("hf://alice/model/checkpoints/a.pt", "generator_ema", "student.init")
    assert same(found, to_diffusers(original))


def test_a_student_opens_from_the_hub(tiny_student, hub, tmp_path):
    student = tiny_student()
    save_student(student, tmp_path / "a")
    files = {path.relative_to(tmp_path / "a").as_posix(): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    hub.add("alice/student", files)
    assert same(state_of(open_student("hf://alice/student")), state_of(student))
    started = starting_student(student.config, student.video, 0, "hf://alice/student")
    assert same(state_of(started), state_of(student))


# Folders of diffusers


@pytest.fixture
def sharded(original, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 100_000)
    write_weights(to_diffusers(original), tmp_path)
    return tmp_path


def test_large_weights_are_written_in_shards(sharded, original):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 110_000 for path in sharded.glob("*.safetensors"))
    assert same(read_weights(sharded, None, "student.init"), to_diffusers(original))


def test_stock_diffusers_opens_the_shards(sharded, original):
    new_transformer(wan()).save_config(sharded)
    stock = WanTransformer3DModel.from_pretrained(sharded)
    assert same(dict(stock.state_dict()), to_diffusers(original))


def test_written_weights_are_as_readable_as_any_file(adapted, tmp_path):
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    for path in ("base/transformer/diffusion_pytorch_model.safetensors", "lora/adapter/adapter_model.safetensors"):
        assert (tmp_path / path).stat().st_mode == mode


@pytest.mark.parametrize("folder", ["", "transformer"])
def test_shards_that_diffusers_wrote_are_read(tmp_path, folder):
    transformer = new_transformer(wan())
    transformer.save_pretrained(tmp_path / folder, max_shard_size="100KB")
    assert same(read_weights(tmp_path, None, "student.init"), transformer.state_dict())


def test_links_to_shards_are_followed_as_in_the_cache_of_the_hub(sharded, original):
    for number, path in enumerate(sorted(sharded.glob("*.safetensors"))):
        path.rename(sharded / f"blob{number}")
        path.symlink_to(sharded / f"blob{number}")
    assert same(read_weights(sharded, None, "student.init"), to_diffusers(original))


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..\\a.safetensors", "..", 7])
def test_an_index_that_reaches_out_of_its_folder_is_refused(tmp_path, name):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / checkpoints.INDEX).write_text(json.dumps({"weight_map": {"proj_out.bias": name}}))
    with pytest.raises(UserError, match=r"index\.json: names .*, which is (not a file beside it|missing)"):
        read_weights(tmp_path, None, "student.init")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}', "[" * 10_000])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / checkpoints.INDEX).write_text(content)
    with pytest.raises(UserError, match=r"index\.json: not an index of weights"):
        read_weights(tmp_path, None, "student.init")


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    index = json.loads((sharded / checkpoints.INDEX).read_text())
    index["weight_map"].pop("proj_out.bias")
    (sharded / checkpoints.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not agree with its shards: proj_out\.bias"):
        read_weights(sharded, None, "student.init")


def test_a_missing_shard_is_named(sharded):
    (victim,) = sharded.glob("*-00002-of-*")
    victim.unlink()
    with pytest.raises(UserError, match=rf"names {victim.name}, which is missing"):
        read_weights(sharded, None, "student.init")


# Into a network


def test_weights_replace_those_of_a_network_on_the_meta_device(original):
    with torch.device("meta"):
        transformer = new_transformer(wan())
    weights = to_diffusers(original)
    load_weights(transformer, weights, "here")
    assert transformer.proj_out.bias.data_ptr() == weights["proj_out.bias"].data_ptr()
    assert same(dict(transformer.state_dict()), weights)


def test_what_does_not_fit_is_listed_by_kind(original):
    weights = to_diffusers(original)
    weights |= {"b.bias": torch.zeros(1), "proj_out.bias": torch.zeros(3)}
    for name in list(weights)[:7]:
        del weights[name]
    with pytest.raises(UserError) as error:
        load_weights(new_transformer(wan()), weights, "here")
    text = str(error.value)
    assert text.startswith("here: the weights do not fit the network; 7 tensors missing: ")
    assert " and 2 more; 1 tensors unknown: b.bias; " in text
    assert text.endswith("1 tensors of another shape: proj_out.bias [3] instead of [64]")


# Starting students


def test_a_training_starts_from_original_weights(original, tmp_path):
    torch.save({"generator": prefixed(original, "model.")}, tmp_path / "a.pt")
    student = starting_student(wan(), RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))
    assert same(to_original(state_of(student)), original)
    assert student.net.training
    assert all(parameter.requires_grad for parameter in student.net.parameters())


def test_the_student_does_not_live_in_the_file(original, tmp_path):
    torch.save(original, tmp_path / "a.pt")
    student = starting_student(wan(), RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))
    (tmp_path / "a.pt").write_bytes(bytes((tmp_path / "a.pt").stat().st_size))
    assert same(to_original(state_of(student)), original)


def test_bfloat16_keeps_what_diffusers_keeps_in_float32(original, tmp_path):
    torch.save(original, tmp_path / "a.pt")
    config = wan(dtype="bfloat16")
    student = starting_student(config, RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))
    stock = new_transformer(config)
    load_weights(stock, to_diffusers(original), "stock")
    stock.save_pretrained(tmp_path / "stock")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "stock", torch_dtype=torch.bfloat16)
    assert same(state_of(student), stock.state_dict())
    save_student(student, tmp_path / "student")
    assert same(state_of(open_student(tmp_path / "student")), state_of(student))


def test_nothing_of_an_opened_student_is_left_on_the_meta_device(tiny_student, tmp_path):
    save_student(tiny_student(), tmp_path / "a")
    net = open_student(tmp_path / "a").net
    assert {each.device.type for each in [*net.parameters(), *net.buffers()]} == {"cpu"}
    assert not net.training


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dim": 24, "frequency_dim": None}, "dim 48 (the recipe: 24), frequency_dim 32 (the recipe: 24). "
         "Set student.dim=48, student.frequency_dim=32, student.heads (weights do not show it; "),
        ({"layers": 3}, "layers 2 (the recipe: 3). Set student.layers=2."),
        ({"ffn_dim": 64, "text_dim": 16}, "Set student.ffn_dim=96, student.text_dim=40."),
        ({"coordinates": True}, "channels_in 16 (the recipe: 18). Set student.autoencoder, student.pixel_factor and"),
        ({"autoencoder": "pixels"}, "channels_in 16 (the recipe: 48), channels_out 16 (the recipe: 48). Set student.a"),
    ],
)  # fmt: skip
def test_the_keys_of_the_recipe_that_do_not_agree_with_the_weights_are_named(original, tmp_path, settings, said):
    torch.save(original, tmp_path / "a.pt")
    with pytest.raises(UserError) as error:
        starting_student(wan(**settings), RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))
    assert said in str(error.value)


def test_the_size_of_released_weights_is_recognised(tmp_path):
    released = {
        "patch_embedding.weight": torch.zeros(1).expand(1536, 16, 1, 2, 2),
        "condition_embedder.text_embedder.linear_1.weight": torch.zeros(1).expand(1, 4096),
        "condition_embedder.time_embedder.linear_1.weight": torch.zeros(1).expand(1, 256),
        **{f"blocks.{i}.ffn.net.0.proj.weight": torch.zeros(1).expand(8960, 1) for i in range(30)},
    }
    torch.save(released, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"dim 1536 .* Set student\.size=1\.3B and leave these keys out\.$"):
        starting_student(wan(), RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))


def test_heads_that_only_the_folder_states_are_compared(tmp_path):
    new_transformer(wan()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"heads 2 \(the recipe: 4\)\. Set student\.heads=2\."):
        starting_student(wan(heads=4), RECORDED_VIDEO, 0, str(tmp_path))


def test_a_student_folder_of_another_network_is_told_from_its_description(tiny_student, tmp_path):
    student = tiny_student()
    save_student(student, tmp_path / "a")
    config = changed(student.config, prediction="clean")
    with pytest.raises(UserError, match=r"has prediction velocity, the recipe has clean\. Set student\.prediction as"):
        starting_student(config, student.video, 0, str(tmp_path / "a"))


def test_a_training_may_start_in_another_precision_than_its_student_was_kept_in(tiny_student, tmp_path):
    student = tiny_student()
    save_student(student, tmp_path / "a")
    config = changed(student.config, dtype="bfloat16", steps=(1000, 500))
    started = starting_student(config, student.video, 0, str(tmp_path / "a"))
    assert started.config.steps == (1000, 500)
    assert state_of(started)[QUERY].dtype == torch.bfloat16


# Adapters


@pytest.fixture
def adapted(tiny_student, tmp_path) -> Student:
    """A student with an active PEFT adapter, whose folders are `base` and `lora` in `tmp_path`."""
    student: Student = tiny_student()
    save_student(student, tmp_path / "base")
    transformer = student.net.transformer
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=ALL), adapter_name="default")
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    state = get_peft_model_state_dict(transformer, adapter_name="default")
    save_adapter(tmp_path / "lora", student, "../base", state, rank=3, alpha=6.0, targets=ALL)
    return student


def velocity(student: Student) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *student.shape, generator=generator)
    text = student.encode_text(["a red ball falls", "a cube"])
    with torch.no_grad():
        return student.net(noisy, torch.full(noisy.shape[:2], 0.7), text)


def test_an_opened_adapter_is_what_peft_computes(adapted, tmp_path):
    merged, base = open_student(tmp_path / "lora"), open_student(tmp_path / "base")
    assert (velocity(base) - velocity(adapted)).abs().max() > 0.1
    assert_close(velocity(merged), velocity(adapted), atol=1e-5, rtol=0)
    assert state_of(merged).keys() == state_of(base).keys()


def test_the_adapter_folder_opens_in_peft(adapted, tmp_path):
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "base" / "transformer")
    peft = PeftModel.from_pretrained(stock, tmp_path / "lora" / "adapter")
    found = peft.merge_and_unload().state_dict()
    wanted = state_of(open_student(tmp_path / "lora"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, atol=1e-6, rtol=0)


def test_the_merged_weight_is_rounded_once(tiny_student, tmp_path):
    student = tiny_student(dtype="bfloat16")
    save_student(student, tmp_path / "base")
    before = state_of(student)[QUERY].clone()
    down, up = torch.randn(1, 24), torch.randn(24, 1)
    state = {"blocks.0.attn1.to_q.lora_A.weight": down, "blocks.0.attn1.to_q.lora_B.weight": up}
    save_adapter(tmp_path / "lora", student, str(tmp_path / "base"), state, rank=1, alpha=0.5, targets=["to_q"])
    after = state_of(open_student(tmp_path / "lora"))[QUERY]
    assert torch.equal(after, (before.float() + 0.5 * (up @ down)).bfloat16())


def test_a_student_folder_of_adapters_starts_a_training_with_merged_weights(adapted, tmp_path):
    started = starting_student(adapted.config, adapted.video, 0, str(tmp_path / "lora"))
    assert same(state_of(started), state_of(open_student(tmp_path / "lora")))


def test_the_base_of_an_adapter_may_be_original_weights(original, tmp_path):
    torch.save({"generator": original}, tmp_path / "a.pt")
    student = starting_student(wan(), RECORDED_VIDEO, 0, str(tmp_path / "a.pt"))
    state = {"blocks.1.ffn.net.2.lora_A.weight": torch.zeros(2, 96)} | {
        "blocks.1.ffn.net.2.lora_B.weight": torch.ones(48, 2)
    }
    save_adapter(tmp_path / "lora", student, "../a.pt", state, rank=2, alpha=2.0, targets=["ffn.net.2"])
    assert same(to_original(state_of(open_student(tmp_path / "lora"))), original)


def test_an_adapter_of_an_adapter_adds_both(adapted, tmp_path):
    base = open_student(tmp_path / "base")
    down, up = torch.ones(3, 24), torch.ones(24, 3)
    state = {"blocks.0.attn1.to_q.lora_A.weight": down, "blocks.0.attn1.to_q.lora_B.weight": up}
    save_adapter(tmp_path / "second", base, "../lora", state, rank=3, alpha=3.0, targets=["to_q"])
    below = state_of(open_student(tmp_path / "lora"))
    assert_close(state_of(open_student(tmp_path / "second"))[QUERY], below[QUERY] + 3)  # rank 3, all ones


@pytest.mark.parametrize(
    ("base", "said"),
    [("../elsewhere", "base ../elsewhere: not there"), (".", "is the base of itself"), ("../lora/.", "of itself")],
)
def test_a_base_that_cannot_be_is_named(adapted, tmp_path, base, said):
    about = json.loads((tmp_path / "lora" / "student.json").read_text())
    (tmp_path / "lora" / "student.json").write_text(json.dumps(about | {"base": base}))
    with pytest.raises(UserError, match=said):
        open_student(tmp_path / "lora")


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"to_q": 5}}, {"r": 0}, {"peft_type": "IA3"}]
)
def test_an_adapter_other_than_plain_lora_is_refused(adapted, tmp_path, change):
    path = tmp_path / "lora" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"adapter_config\.json: not the description of a plain LoRA"):
        open_student(tmp_path / "lora")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks.9.attn1.to_q.lora_A.weight": torch.zeros(3, 24)}, "blocks.9.attn1.to_q is not a linear layer"),
        ({"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 24)}, r"another shape than rank 3 of \(24, 24\)"),
        ({"blocks.0.attn1.to_q.lora_magnitude_vector": torch.zeros(1)}, "not a plain LoRA: blocks.0.*magnitude"),
    ],
)
def test_adapters_that_do_not_fit_are_named(adapted, tmp_path, change, said):
    path = tmp_path / "lora" / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | prefixed(change, "base_model.model."), path)
    with pytest.raises(UserError, match=said):
        open_student(tmp_path / "lora")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_part_of_an_adapter_is_named(adapted, tmp_path, name):
    (tmp_path / "lora" / "adapter" / name).unlink()
    with pytest.raises(UserError, match=f"{name}: a part of the adapter is missing"):
        open_student(tmp_path / "lora")


def test_random_weights_follow_from_the_seed_alone(tiny_student):
    student = tiny_student()
    again = starting_student(student.config, student.video, 0, None)
    assert same(state_of(again), state_of(new_student(student.config, student.video, 0)))
