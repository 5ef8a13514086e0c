"""Arithmetic on discriminators against the networks themselves: parameters, operations, and what a pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLModel, VJEPA2Config, VJEPA2Model

from afd_data.config import VideoConfig
from afd_train.config import Recipe, StudentConfig
from afd_train.discriminator_config import (
    DiscriminatorConfig,
    FeaturesConfig,
    SpaceTimeConfig,
    VJepa2Config,
    VlmConfig,
)
from afd_train.discriminator_cost import Cost, cost_of
from afd_train.discriminators import Prompts, open_discriminator
from afd_train.memory import table, total
from afd_train.memory_discriminators import discriminator, scoring, seconds
from afd_train.memory_parts import Load
from afd_train.objective_config import FlowMatchingConfig
from afd_train.students import Student, new_student
from afd_train.trunk_cost import qwen2_vl_trunk, vjepa2_trunk
from tests.tiny_trunks import save_qwen2_vl, save_vjepa2

TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
# Wide enough for what grows with the widths to be nearly all.
WIDE_VJEPA2: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "crop_size": 64}
WIDE_QWEN2: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]},
}  # fmt: skip
PROMPT = " ".join("a" * 10)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_vjepa2_has_as_many_parameters_as_its_encoder():
    with torch.device("meta"):
        encoder = VJEPA2Model(VJEPA2Config()).encoder
    assert vjepa2_trunk(VJepa2Config()).frozen == count(encoder) == 303_885_312


def test_qwen2_vl_has_the_parameters_of_its_tower_and_its_language_model():
    with torch.device("meta"):
        model = Qwen2VLModel(Qwen2VLConfig(text_config=TEXT, vision_config={"hidden_size": 1536}))
    trunk = qwen2_vl_trunk(VlmConfig(), 480, 832, 750)
    assert trunk.frozen == count(model) == 2_208_985_600
    assert trunk.adapters == pytest.approx(73.9e6, rel=1e-3)  # VideoAlign's, at the same rank


def test_ten_frames_of_the_measured_clip_are_13_tflop():
    trunk = qwen2_vl_trunk(VlmConfig(), 480, 832, 750)
    assert trunk.tokens == 2010
    assert trunk.before + trunk.linears + trunk.attention == pytest.approx(13e12, rel=0.03)


Make = Callable[..., tuple[Recipe, Student]]


@pytest.fixture
def made(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Make:
    """`made(config, layers=2)` -> a recipe with this discriminator, and its student."""

    def make(config: DiscriminatorConfig, **student: Any) -> tuple[Recipe, Student]:
        tiny = tiny_recipe(tmp_path / "run", student=student)
        recipe = Recipe.model_validate(dict(tiny) | {"discriminator": config})
        return recipe, new_student(recipe.student, recipe.video, 0)

    return make


def cost(recipe: Recipe) -> Cost:
    return cost_of(recipe, Load.of(recipe, recipe.train, processes=1))


def trunk_folder(kind: str, folder: Path, **settings: Any) -> Path:
    return save_vjepa2(folder, **settings) if kind == "vjepa2" else save_qwen2_vl(folder, **settings)


def adapted(kind: str, folder: Path, **settings: Any) -> Any:
    """A `VJepa2Config` or `VlmConfig`."""
    if kind == "vjepa2":
        return VJepa2Config(path=str(folder), dim=16, frames=4, **settings)
    return VlmConfig(path=str(folder), frames=4, **settings)


@pytest.mark.parametrize(
    ("config", "student"),
    [
        (SpaceTimeConfig(), {}),
        (SpaceTimeConfig(dim=24, layers=3, patch=2, tubelet_frames=1, chunk_causal=True), {}),
        (SpaceTimeConfig(reference=True, view="luminance"), {}),
        (FeaturesConfig(), {"layers": 4}),
        (FeaturesConfig(dim=16, blocks=(0, 1)), {"layers": 4, "dtype": "bfloat16"}),
    ],
)
def test_parameters_are_those_of_the_network(made, config, student):
    recipe, start = made(config, **student)
    net = open_discriminator(config, start, 0)
    assert (cost(recipe).trained, cost(recipe).frozen) == (trained(net), count(net) - trained(net))
    frozen = sum(parameter.nbytes for parameter in net.parameters() if not parameter.requires_grad)
    assert cost(recipe).frozen_bytes == frozen


@pytest.mark.parametrize("kind", ["vjepa2", "vlm"])
@pytest.mark.parametrize("train", ["lora", "frozen"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_are_those_of_the_network_in_the_folder(made, tmp_path, kind, train, dtype):
    config = adapted(kind, trunk_folder(kind, tmp_path / "trunk"), train=train, dtype=dtype, rank=3)
    recipe, start = made(config)
    net = open_discriminator(config, start, 0)
    found = cost(recipe)
    reward = 24 if kind == "vlm" and train == "frozen" else 0  # is there and not trained
    assert (found.trained, found.frozen) == (trained(net), count(net) - trained(net) - reward)
    halves = sum(p.numel() for p in net.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    assert found.rounded == halves


def trained(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def passed(net: Any, recipe: Recipe) -> tuple[int, int, int]:
    """Operations of a pass without and with backward, and bytes that the latter keeps, of two clips."""
    shape = recipe.student.latent_shape(recipe.video)
    video = recipe.video
    clips = torch.randn(2, *shape) if net.space == "latents" else torch.rand(2, 4, 3, video.height, video.width)
    words = Prompts([PROMPT] * 2, torch.randn(2, recipe.student.text_tokens, recipe.student.text_dim))
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(clips, words, clips)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # The CPU's fused attention is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores, forward = net(clips, words, clips), counter.get_total_flops()
        scores.sum().backward()
    return forward, counter.get_total_flops(), size


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (SpaceTimeConfig(dim=64), 1.1),
        (SpaceTimeConfig(dim=64, reference=True, chunk_causal=True), 1.1),
        # Embeddings of time, text and pixels, which are more than nothing in a narrow student.
        (FeaturesConfig(dim=32), 1.3),
    ],
)
def test_operations_are_those_of_the_running_network(made, config, most):
    recipe, start = made(config, dim=96, layers=3, ffn_dim=200)
    forward, both, _ = passed(open_discriminator(config, start, 0), recipe)
    assert 1 <= forward / (2 * cost(recipe).scoring) < most
    assert 1 <= both / (2 * cost(recipe).learning) < most


def test_operations_and_kept_bytes_are_those_of_the_running_vjepa2(made, tmp_path):
    config = adapted("vjepa2", trunk_folder("vjepa2", tmp_path / "trunk", **WIDE_VJEPA2), rank=8)
    recipe, start = made(config)
    forward, both, kept = passed(open_discriminator(config, start, 0), recipe)
    found = cost(recipe)
    assert forward / 2 == pytest.approx(found.scoring, rel=0.1)
    assert both / 2 == pytest.approx(found.learning, rel=0.1)
    assert kept / 2 == pytest.approx(found.saved, rel=0.15)


def test_operations_and_kept_bytes_are_those_of_the_running_qwen2_vl(made, tmp_path):
    config = adapted("vlm", trunk_folder("vlm", tmp_path / "trunk", **WIDE_QWEN2), rank=8)
    recipe, start = made(config)
    forward, _, kept = passed(open_discriminator(config, start, 0), recipe)
    # Its tokenizer knows letters only: opening, video's ends, prompt, instruction, reward.
    words = 6 + 2 + len(PROMPT) + 1 + len(config.instruction) + 1
    trunk = qwen2_vl_trunk(config, recipe.video.height, recipe.video.width, words)
    operations = trunk.before + trunk.linears + trunk.attention + 2 * trunk.adapters * trunk.tokens
    assert forward / 2 == pytest.approx(operations, rel=0.1)
    assert kept / 2 == pytest.approx(trunk.layers * trunk.tokens * trunk.saved, rel=0.15)


PAPER = VideoConfig(width=832, height=480, frames=81, fps=16.0)


def large(made: Make, config: DiscriminatorConfig) -> tuple[Recipe, Load]:
    """The 1.3B student at its own size."""
    recipe = made(SpaceTimeConfig())[0]
    student = StudentConfig(preset="self-forcing")
    recipe = recipe.model_copy(update={"student": student, "video": PAPER, "discriminator": config})
    return recipe, Load.of(recipe, recipe.train, processes=1)


def test_a_frozen_trunk_of_2_billion_weights_takes_4_gb_and_its_adapters_1_3(made):
    recipe, load = large(made, VlmConfig())
    size = {part.name: part.bytes / 1e9 for part in discriminator(recipe, recipe.train, load)}
    assert size["its trunk"] == pytest.approx(4.42, abs=0.01)
    assert size["discriminator"] == pytest.approx(0.0739 * 18, rel=0.01)  # two bytes, master, gradient, two moments
    assert size["autoencoder"] == pytest.approx(0.51, abs=0.01)


def test_checkpointing_saves_memory_and_costs_a_forward_pass(made):
    plain, kept = (cost(large(made, VlmConfig(gradient_checkpointing=flag))[0]) for flag in (False, True))
    assert kept.saved < 0.1 * plain.saved
    assert plain.learning < kept.learning < 1.5 * plain.learning
    assert kept.scoring == plain.scoring


def test_a_frozen_trunk_keeps_nothing_for_a_backward_pass(made):
    found = cost(large(made, VlmConfig(train="frozen"))[0])
    assert found.saved == 0
    assert found.learning == pytest.approx(found.scoring)


@pytest.mark.parametrize(
    ("settings", "sets"), [({}, 2), ({"r1_weight": 1.0}, 3), ({"mismatch_weight": 1.0, "r1_weight": 1.0}, 4)]
)
def test_a_penalty_and_a_second_comparison_have_a_set_of_clips_each(made, settings, sets):
    base: dict[str, Any] = {"patch": 4, "tubelet_frames": 3, "warmup_prompts": 512}
    found = []
    for some in ({}, settings):
        recipe, load = large(made, SpaceTimeConfig(**(base | some)))
        found.append(total(scoring(recipe, recipe.train, load)))
    assert found[1] == sets / 2 * found[0]


@pytest.mark.parametrize(
    "config", [SpaceTimeConfig(patch=4, tubelet_frames=3), FeaturesConfig(), VJepa2Config(), VlmConfig()]
)
def test_a_dry_run_prints_seconds_a_clip_where_there_is_a_discriminator(made, config):
    recipe, _ = large(made, config)
    lines = [line for line in table(recipe, recipe.train) if "TFLOP" in line]
    assert len(lines) == 1
    assert "to score" in lines[0]
    run = recipe.train.model_copy(update={"objective": FlowMatchingConfig()})
    assert not any("TFLOP" in line for line in table(recipe, run))


def test_the_measured_clip_takes_a_thirtieth_of_a_second_to_score(made):
    recipe, load = large(made, VlmConfig())
    (line,) = seconds(recipe, recipe.train, load)
    assert "to score 12.8 TFLOP = 0.032 s" in line  # 13 with a longer prompt
