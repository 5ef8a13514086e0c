"""Discriminators on the features of other networks: what they see, what is trained, and weights that are missing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from afd_data.errors import UserError
from afd_train.checkpoint import Parts, load_checkpoint, save_checkpoint
from afd_train.config import LoraConfig, TrainConfig
from afd_train.discriminator_config import DiscriminatorConfig, FeaturesConfig, VJepa2Config, VlmConfig
from afd_train.discriminators import Prompts, evenly_spaced, open_discriminator
from afd_train.discriminators.features import Features
from afd_train.discriminators.pretrained import resized
from afd_train.discriminators.vlm import DEVIATION, MEAN, VisionLanguage, patches
from afd_train.identity import identity_of
from afd_train.losses import bradley_terry_loss
from afd_train.objective_config import SftConfig
from afd_train.optimizer import Optimizer
from afd_train.parallel import Processes, open_accelerator
from afd_train.policies import Trainee
from afd_train.students import Student
from tests.tiny_trunks import save_qwen2_vl, save_vjepa2

ONE = Processes(open_accelerator(), TrainConfig())  # process
TEXTS = ["a red ball falls", "blue"]
BFLOAT: dict[str, Any] = {"dtype": "bfloat16"}
CHECKPOINTED: dict[str, Any] = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("trunks")
    return {"vjepa2": save_vjepa2(root / "vjepa2"), "vlm": save_qwen2_vl(root / "vlm")}


Open = Callable[..., nn.Module]


@pytest.fixture
def opened(folders: dict[str, Path], tiny_student: Callable[..., Student]) -> Open:
    """`opened("vjepa2", seed=0, train="frozen", ...)`; for `features` the dtype is that of the student."""

    def make(kind: str, seed: int = 0, dtype: str = "float32", **settings: Any) -> nn.Module:
        return open_discriminator(config_of(kind, folders, dtype, **settings), tiny_student(dtype=dtype), seed)

    return make


def config_of(kind: str, folders: dict[str, Path], dtype: str = "float32", **settings: Any) -> DiscriminatorConfig:
    small: dict[str, Any] = {"rank": 4, "alpha": 8.0, "frames": 4, "dtype": dtype}
    match kind:
        case "features":
            return FeaturesConfig(dim=16, **settings)
        case "vjepa2":
            return VJepa2Config(path=str(folders[kind]), dim=16, **(small | settings))
        case _:
            return VlmConfig(path=str(folders[kind]), **(small | settings))


def clips_for(net: Any, count: int, seed: int = 0) -> Tensor:
    """Four frames in the network's space, standard normal or uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    if net.space == "latents":
        return torch.randn(count, 4, 48, 4, 4, generator=generator)
    return 2 * torch.rand(count, 4, 3, 40, 56, generator=generator) - 1


def prompts(count: int = 2) -> Prompts:
    embeddings = torch.randn(len(TEXTS), 6, 16, generator=torch.Generator().manual_seed(0))
    return Prompts(TEXTS, embeddings).of([index % 2 for index in range(count)])


def optimizer_of(net: nn.Module) -> Optimizer:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return Optimizer(trained, ONE, max_grad_norm=1.0, weight_decay=0.01, betas=(0.5, 0.99))


def learn(net: nn.Module, optimizer: Optimizer, steps: range, rate: float = 1e-2) -> list[float]:
    """Bradley-Terry between clips and the same upside down and darker; step n has clips of its own."""
    losses = []
    for step in steps:
        clips, words = clips_for(net, 4, seed=step), prompts(4)
        loss = bradley_terry_loss(net(clips, words).mean(1), net(clips.flip(3) - 0.5, words).mean(1))
        optimizer.accumulate(loss)
        optimizer.step(rate)
        losses.append(float(loss.detach()))
    return losses


KINDS = ["features", "vjepa2", "vlm"]
VARIANTS = [
    pytest.param(kind, settings, id=f"{kind}-{'-'.join(map(str, settings.values()))}")
    for kind in KINDS
    for settings in ({}, BFLOAT, *([] if kind == "features" else [BFLOAT | CHECKPOINTED, {"train": "frozen"}]))
]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_a_score_a_clip_that_depends_on_the_prompt_and_on_the_order_of_frames(opened, kind, settings):
    net = opened(kind, **settings)
    clips, words = clips_for(net, 2), prompts()
    scores = net(clips, words)
    assert (scores.shape, scores.dtype) == ((2, 1), torch.float32)
    assert not torch.allclose(net(clips, words.of([1, 0])), scores)
    assert not torch.allclose(net(clips.flip(1), words), scores)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_the_other_clips_of_a_batch(opened, kind):
    net = opened(kind)
    clips, words = clips_for(net, 2), prompts()
    alone = torch.cat([net(clips[row : row + 1], words.of([row])) for row in range(2)])
    assert_close(net(clips, words), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_it_learns_what_tells_clips_apart(opened, kind, settings):
    net = opened(kind, **settings)
    # A frozen language model leaves 24 numbers to be trained.
    rate = 0.1 if settings.get("train") == "frozen" else 1e-2
    losses = learn(net, optimizer_of(net), range(15), rate)
    assert losses[0] > 0.5  # no opinion: ln 2
    assert sum(losses[-5:]) / 5 < 0.6 * math.log(2)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_going_on_from_a_checkpoint_equals_never_having_stopped(opened, tmp_path, kind, settings):
    unbroken, resumed = (opened(kind, seed=0, **settings) for _ in range(2))
    optimizers = [optimizer_of(net) for net in (unbroken, resumed)]
    learn(unbroken, optimizers[0], range(3))
    save_checkpoint(tmp_path / "step-000003", parts(unbroken, optimizers[0]), {"step": 3}, ONE)
    learn(resumed, optimizers[1], range(7, 9))  # something to forget
    load_checkpoint(tmp_path / "step-000003", parts(resumed, optimizers[1]))
    optimizers[1].synchronise()
    losses = [learn(net, own, range(3, 5)) for net, own in zip((unbroken, resumed), optimizers, strict=True)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


def parts(net: nn.Module, optimizer: Optimizer) -> Parts:
    return Parts({"discriminator": optimizer.exact(net)}, {"discriminator": optimizer.adamw})


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_keeps_what_is_trained_and_nothing_else(opened, kind):
    net = opened(kind)
    kept = optimizer_of(net).exact(net)
    assert kept.keys() == {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert not any("base_layer" in name or "embed_tokens" in name for name in kept)


@pytest.mark.parametrize("kind", ["vjepa2", "vlm"])
def test_adapters_start_without_effect_and_a_frozen_trunk_trains_the_head_only(opened, kind):
    adapted, frozen = opened(kind), opened(kind, train="frozen")
    frozen.load_state_dict({k: v for k, v in adapted.state_dict().items() if k.startswith("head")}, strict=False)
    clips, words = clips_for(frozen, 2), prompts()
    assert_close(adapted(clips, words), frozen(clips, words))
    trained = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("head.") for name in trained)


@pytest.mark.parametrize("kind", ["vjepa2", "vlm"])
def test_gradient_checkpointing_keeps_less_for_the_same_gradient(opened, kind):
    found = []
    for settings in ({}, CHECKPOINTED):
        net, kept = opened(kind, **settings), [0]
        with saved_tensors_hooks(lambda tensor, kept=kept: count(tensor, kept), lambda tensor: tensor):
            score = net(clips_for(net, 2), prompts()).sum()
        score.backward()
        found.append((kept[0], [p.grad for p in net.parameters() if p.requires_grad]))
    assert found[1][0] < 0.7 * found[0][0]
    assert_close(found[0][1], found[1][1])


def count(tensor: Tensor, kept: list[int]) -> Tensor:
    kept[0] += tensor.nbytes
    return tensor


@pytest.fixture(params=["vjepa2", "vlm"])
def copy(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> tuple[str, Path]:
    """A kind, and a copy of its folder for a test to damage."""
    return request.param, Path(shutil.copytree(folders[request.param], tmp_path / "copy"))


def reopened(kind: str, folder: Path, student: Student) -> nn.Module:
    return open_discriminator(config_of(kind, {kind: folder}), student, 0)


LACKING = {
    "vjepa2": ["encoder.layer.1.mlp.fc2.bias", "encoder.embeddings.patch_embeddings.proj.weight"],
    "vlm": ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.2.bias", "model.embed_tokens.weight"],
}


@pytest.mark.parametrize("which", [0, 1, -1])
def test_one_missing_tensor_is_an_error_that_names_it(copy, tiny_student, which):
    kind, folder = copy
    path, name = folder / "model.safetensors", LACKING[kind][which]
    state = load_file(path)
    del state[name]
    save_file(state, path, {"format": "pt"})
    last = name.removeprefix("model.")
    with pytest.raises(UserError, match=rf"discriminator\.path: .* lacks 1 tensors .*{last}.*download it again"):
        reopened(kind, folder, tiny_student())


def test_a_tensor_of_another_shape_is_an_error(copy, tiny_student):
    kind, folder = copy
    path, name = folder / "model.safetensors", LACKING[kind][0]
    state = load_file(path)
    state[name] = state[name].repeat_interleave(2, 0)
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"discriminator\.path: .* cannot be loaded .*again"):
        reopened(kind, folder, tiny_student())


def test_weights_under_other_names_are_not_replaced_by_random_ones(copy, tiny_student):
    kind, folder = copy
    path = folder / "model.safetensors"
    save_file({f"net.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ tensors"):
        reopened(kind, folder, tiny_student())


def test_pickled_and_truncated_weights_are_not_opened(copy, tiny_student):
    kind, folder = copy
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        reopened(kind, folder, tiny_student())
    path.write_bytes(content)
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        reopened(kind, folder, tiny_student())


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"model_type": "llama"}'])
def test_a_folder_of_something_else_is_named(copy, tiny_student, content):
    kind, folder = copy
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"discriminator\.path: "):
        reopened(kind, folder, tiny_student())


@pytest.mark.parametrize("content", [None, "", "{}", "<html>"])
def test_a_model_without_its_tokenizer_is_named(folders, tiny_student, tmp_path, content):
    folder = Path(shutil.copytree(folders["vlm"], tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"discriminator\.path: .* holds no tokenizer"):
        reopened("vlm", folder, tiny_student())


def test_frames_that_make_no_whole_token_are_named(opened):
    for kind in ("vjepa2", "vlm"):
        with pytest.raises(UserError, match=r"discriminator\.frames: 5 is not divisible by 2, .* Set 6\."):
            opened(kind, frames=5)


def test_dropout_that_a_folder_asks_for_is_not_used(folders, tiny_student, tmp_path):
    folder = Path(shutil.copytree(folders["vjepa2"], tmp_path / "copy"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(about | {"attention_probs_dropout_prob": 0.5, "drop_path_rate": 0.5})
    )
    net = reopened("vjepa2", folder, tiny_student())
    clips, words = clips_for(net, 2), prompts()
    assert torch.equal(net(clips, words), net(clips, words))


@pytest.mark.parametrize(("frames", "wanted"), [(2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10)))])
def test_the_first_and_the_last_frame_are_among_those_that_are_seen(frames, wanted):
    assert evenly_spaced(torch.arange(10.0)[None], frames)[0].tolist() == wanted


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280), (832, 480), (336, 588), (1080, 1920)])
def test_frames_have_the_size_of_qwens_own_processor(height, width):
    own = VlmConfig().frame_size(height, width, 28)
    assert own == smart_resize(height, width, 28, 784, 200_704)


def test_the_measured_clip_has_1260_video_tokens():
    height, width = VlmConfig().frame_size(480, 832, 28)
    assert (height, width) == (336, 588)
    assert 10 // 2 * (height // 28) * (width // 28) == 1260


def test_patches_are_those_of_qwens_own_processor():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 56, 84), generator=generator, dtype=torch.uint8)
    wanted = Qwen2VLImageProcessorPil()(image.permute(1, 2, 0).numpy(), return_tensors="pt", size={
        "shortest_edge": 784, "longest_edge": 10**6})  # fmt: skip
    frames = (image.float() / 127.5 - 1).expand(1, 2, 3, 56, 84)  # an image is two equal frames
    vision = type("Vision", (), {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2})
    found = patches(resized(frames, 56, 84, MEAN, DEVIATION), vision)
    assert wanted["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert_close(found, wanted["pixel_values"], rtol=0, atol=1e-5)


def test_a_prompt_cannot_smuggle_special_tokens_in(opened):
    net = opened("vlm")
    assert isinstance(net, VisionLanguage)
    about = net.trunk.config
    read = net.words.around_video(["<|video_pad|><|vision_end|>", "a"], 4, about)
    assert (read.ids == about.video_token_id).sum(1).tolist() == [4, 4]
    assert (read.kinds == 2).sum(1).tolist() == [4, 4]


def test_features_are_those_of_the_starting_student_whatever_becomes_of_it(tiny_student):
    student = tiny_student()
    net = open_discriminator(FeaturesConfig(dim=16), student, 0)
    clips, words = clips_for(net, 2), prompts()
    before = net(clips, words)
    with torch.no_grad():
        for parameter in student.net.parameters():
            parameter.add_(1)
    assert torch.equal(net(clips, words), before)


def test_a_student_that_is_about_to_be_adapted_has_the_features_of_the_one_without_adapters(tiny_student):
    scores = []
    for config in (TrainConfig(), TrainConfig(policy=LoraConfig(rank=4), gradient_checkpointing=True)):
        student = tiny_student()
        Trainee(student.net, config, ONE)
        net = open_discriminator(FeaturesConfig(dim=16), student, 0)
        assert not any("lora" in name for name, _ in net.named_parameters())
        scores.append(net(clips_for(net, 2), prompts()))
    assert torch.equal(*scores)


def test_a_chunks_features_depend_on_it_and_on_chunks_before(tiny_student):
    net = open_discriminator(FeaturesConfig(dim=16), tiny_student(frames=6), 0)
    assert isinstance(net, Features)
    seen: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    clips = torch.randn(1, 6, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = clips.clone()
    changed[:, 2:4] += 1
    for each in (clips, changed):
        net(each, prompts(1))
    same = (seen[0] == seen[1]).flatten(2).all(2)
    assert same.tolist() == [[True, True, False, False, False, False]]


def test_the_gradient_reaches_a_clip_through_the_frozen_features(tiny_student):
    net = open_discriminator(FeaturesConfig(dim=16), tiny_student(), 0)
    clips = clips_for(net, 2).requires_grad_()
    net(clips, prompts()).sum().backward()
    assert clips.grad is not None
    assert (clips.grad.flatten(2).abs().sum(2) > 0).all()
    assert all(parameter.grad is None for parameter in net.get_submodule("trunk").parameters())


def test_blocks_after_the_last_one_that_is_looked_at_are_not_kept(tiny_student):
    student = tiny_student(layers=4)
    for blocks, kept in (((), 4), ((1, 0), 2)):
        net = open_discriminator(FeaturesConfig(blocks=blocks), student, 0)
        assert isinstance(net, Features)
        assert len(net.trunk.transformer.blocks) == kept


def test_a_block_that_the_student_does_not_have_is_named(tiny_student):
    with pytest.raises(UserError, match=r"discriminator\.blocks: 2, but the student has 2 blocks \(0 to 1\)"):
        open_discriminator(FeaturesConfig(blocks=(0, 2)), tiny_student(), 0)


def test_a_run_is_known_by_the_weights_of_its_discriminators_trunk(folders, tiny_recipe, tmp_path):
    folder = Path(shutil.copytree(folders["vjepa2"], tmp_path / "vjepa2"))
    recipe = tiny_recipe(tmp_path).model_copy(update={"discriminator": VJepa2Config(path=str(folder))})
    net = nn.Linear(1, 1)

    def identity(config: TrainConfig) -> dict[str, Any]:
        return identity_of(recipe, config, net, sharded=False)

    first = identity(TrainConfig())
    assert identity(TrainConfig()) == first
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors")
    second = identity(TrainConfig())
    assert [key for key in first if first[key] != second[key]] == ["discriminator weights"]
    assert "discriminator weights" not in identity(TrainConfig(objective=SftConfig()))
