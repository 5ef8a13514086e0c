"""The memory estimate: notes on the 1.3B student at 480 x 832 and 81 frames, counted tensors, and advice that works."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest

from afd_data.config import FolderConfig, PromptsConfig, VideoConfig
from afd_train.config import LoraConfig, Recipe, SpaceTimeConfig, StudentConfig, TrainConfig
from afd_train.memory import GIB, advice, estimate, missing, table, total
from afd_train.memory_parts import Load, adapter_count, parameter_count, weights
from afd_train.memory_phases import keys_and_values, update

LORA: dict[str, Any] = {"policy": {"name": "lora"}}
LIGHT: dict[str, Any] = {"chunk_by_chunk": True, "gradient_checkpointing": True, "clips_per_pass": 1}
FORCED: dict[str, Any] = {"objective": {"name": "afd", "context_gradient": True}, "clips_per_pass": 1}


def recipe_of(student: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """The released student, or a variant, at its own size."""
    return Recipe(
        out="runs/x",
        video=VideoConfig(width=832, height=480, frames=81, fps=16.0),
        prompts=PromptsConfig(source="teacher"),
        teacher=FolderConfig(path="clips"),
        student=StudentConfig.model_validate({"preset": "self-forcing"} | (student or {})),
        discriminator=SpaceTimeConfig(patch=4, tubelet_frames=3),
        train=TrainConfig.model_validate(train),
    )


def gib(recipe: Recipe, function: Any = estimate) -> dict[str, float]:
    """Part -> GiB, of all or of what one function counts."""
    run = recipe.train
    load = Load.of(recipe, run, processes=1)
    match function.__name__:
        case "estimate":
            parts = function(recipe, run)
        case "keys_and_values":
            parts = function(recipe.student, load)
        case _:
            parts = function(recipe.student, run, load)
    return {part.name: part.bytes / GIB for part in parts}


def near(value: float) -> Any:
    return pytest.approx(value, rel=0.05)


def test_parameters_are_those_of_wan():
    assert parameter_count(StudentConfig(preset="self-forcing")) == 1_418_996_800


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2.64), ("float32", 5.29)])
def test_weights_take_two_or_four_bytes(dtype, size):
    assert gib(recipe_of({"dtype": dtype}))["weights"] == near(size)


def test_full_training_in_bfloat16_keeps_float32_masters_and_moments():
    always, added = gib(recipe_of(**LIGHT), weights), gib(recipe_of(**LIGHT), update)
    of_a_pass = always["weights"] + always["master weights"] + always["Adam"] + added["gradients of a pass"]
    assert of_a_pass == near(21.1)
    assert always["weights"] + always["master weights"] + always["Adam"] + always["gradients"] == near(23.8)


@pytest.mark.parametrize(
    ("policy", "millions"),
    [
        (LoraConfig(), 350.0),
        (LoraConfig(rank=128), 175.0),
        (LoraConfig(rank=64), 87.5),
        (LoraConfig(rank=32), 43.7),
        (LoraConfig(targets="attention"), 188.7),
    ],
)
def test_adapters_have_as_many_parameters_as_their_rank_says(policy, millions):
    student = StudentConfig(preset="self-forcing")
    assert adapter_count(student, policy) / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize(("rank", "size"), [(256, 5.2), (128, 2.6), (32, 0.65)])
def test_training_adapters_takes_four_float32_numbers_a_parameter(rank, size):
    parts = gib(recipe_of(policy={"name": "lora", "rank": rank}), weights)
    assert parts["master weights"] + parts["gradients"] + parts["Adam"] == near(size)


def test_old_policy_and_average_are_float32_adapters():
    parts = gib(recipe_of(**LORA))
    assert (parts["old policy"], parts["evaluation average"]) == (near(1.3), near(1.3))
    assert "reference" not in parts  # the network without its adapter


def test_full_training_keeps_two_averages_and_a_reference():
    parts = gib(recipe_of())
    assert (parts["old policy"], parts["evaluation average"], parts["reference"]) == (near(5.3), near(5.3), near(2.6))


def test_offloaded_copies_are_not_on_the_gpu():
    names = gib(recipe_of(policy={"name": "full", "offload": True})).keys()
    assert not names & {"old policy", "evaluation average", "reference"}


def test_keys_and_values_of_a_clip_and_its_text():
    assert [*gib(recipe_of(**LIGHT), keys_and_values).values()] == [near(5.62), near(0.09)]


@pytest.mark.parametrize(
    ("settings", "inputs", "live"),
    [(FORCED | {"gradient_checkpointing": True}, 5.6, 4.4), (LIGHT, 0.40, 0.32)],
    ids=["teacher-forcing", "chunk-by-chunk"],
)
def test_checkpointing_keeps_block_inputs_and_one_block(settings, inputs, live):
    parts = gib(recipe_of(**settings), update)
    assert (parts["block inputs"], parts["activations"]) == (near(inputs), near(live))


@pytest.mark.parametrize(
    ("settings", "size"),
    [(FORCED, 133), (LIGHT | {"gradient_checkpointing": False}, 9.5)],
    ids=["teacher-forcing", "chunk-by-chunk"],
)
def test_without_checkpointing_all_blocks_are_kept(settings, size):
    parts = gib(recipe_of(**settings), update)
    assert parts["activations"] == near(size)
    assert "block inputs" not in parts


def test_a_detached_context_has_half_the_tokens_of_teacher_forcing_and_copies_share_it():
    one = gib(recipe_of(clips_per_pass=1), update)["activations"]
    assert gib(recipe_of(**FORCED), update)["activations"] == pytest.approx(2 * one)
    three = recipe_of(objective={"name": "afd", "noisings_per_clip": 3}, clips_per_pass=1)
    assert gib(three, update)["activations"] == pytest.approx(3 * one)
    forced = FORCED["objective"] | {"noisings_per_clip": 3}
    assert gib(recipe_of(objective=forced, clips_per_pass=1), update)["activations"] == pytest.approx(4 * one)


def test_sharding_divides_weights_and_optimiser_and_draws_with_all_weights_together():
    recipe = recipe_of(shard="always", **LIGHT)
    whole, quarter = ({p.name: p.bytes for p in estimate(recipe, recipe.train, n)} for n in (1, 4))
    for name in ("weights", "master weights", "gradients", "Adam", "old policy", "reference"):
        assert quarter[name] == whole[name] // 4
    assert quarter["weights together"] == whole["weights"]


def test_data_parallel_processes_share_the_clips_only():
    recipe = recipe_of(shard="never")
    whole, eighth = ({p.name: p.bytes for p in estimate(recipe, recipe.train, n)} for n in (1, 8))
    assert eighth["keys and values"] == whole["keys and values"] // 8
    assert eighth["Adam"] == whole["Adam"]


def test_flow_matching_needs_no_cache_and_no_discriminator():
    names = gib(recipe_of(objective={"name": "flow-matching"})).keys()
    assert not {name for name in names if "keys" in name or "policy" in name or "discriminator" in name}


def live_bytes_after_forward(policy: LoraConfig | None, frames: int) -> int:
    """Of an update's forward pass over [clean; noisy] frames of a tiny real network, weights left out."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from afd_train.policies import lora_targets
    from afd_train.students import new_student

    class Live(TorchDispatchMode):
        """Counts storages from their making to their end."""

        def __init__(self, known: set[int]):
            super().__init__()
            self.bytes, self._known = 0, dict.fromkeys(known, 0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
            return out

        def _gone(self, key: int) -> None:
            self.bytes -= self._known.pop(key)

    config, video = TINY, VideoConfig(width=256, height=256, frames=1 + 4 * (frames - 1), fps=8.0)
    net = new_student(config, video, seed=0).net
    if policy is not None:
        import peft

        net.requires_grad_(False)
        targets = list(lora_targets(policy))
        net.transformer.add_adapter(peft.LoraConfig(r=policy.rank, target_modules=targets))
        for parameter in net.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.requires_grad else parameter.data
    clean, text = torch.randn(1, frames, 16, 32, 32), torch.randn(1, 4, config.text_dim)
    counted = Live({parameter.untyped_storage()._cdata for parameter in net.parameters()})
    with counted:
        out = net(clean, torch.full((1, frames), 0.5), text, clean)
        assert out.requires_grad
    return counted.bytes


TINY = StudentConfig(
    dim=192,
    heads=4,
    layers=4,
    ffn_dim=1120,
    chunk_frames=3,
    dtype="bfloat16",
    autoencoder="wan",
    text_dim=16,
    text_tokens=4,
)


@pytest.mark.parametrize("policy", [None, LoraConfig(rank=32), LoraConfig(rank=32, targets="attention")])
def test_activations_are_those_of_the_running_network(policy):
    run = TrainConfig.model_validate(FORCED | ({"policy": policy} if policy else {}))
    load = Load(step_clips=1, clips=1, prompts=1, shape=TINY.latent_shape(VIDEO), frame_tokens=256, shards=1)
    names = {"activations", "beside them", "contexts"}
    counted = sum(part.bytes for part in update(TINY, run, load) if part.name in names)
    assert counted == pytest.approx(live_bytes_after_forward(policy, frames=3), rel=0.12)


VIDEO = VideoConfig(width=256, height=256, frames=9, fps=8.0)


@pytest.mark.parametrize("settings", [{}, LORA, FORCED, {"policy": {"name": "full", "offload": True}}])
@pytest.mark.parametrize("card", [16, 24, 40, 80])
def test_following_the_advice_makes_it_fit(settings, card):
    recipe = recipe_of(**settings, gpu_memory_gb=float(card))
    lines = advice(estimate(recipe, recipe.train), recipe, recipe.train)
    sets = re.findall(r"--set train\.(\S+)=(\S+)", "\n".join(lines))
    counts = re.findall(r"--num_processes (\d+)", "\n".join(lines))
    tree = recipe.train.model_dump()
    for key, value in sets:
        section, _, name = key.rpartition(".")
        plain = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
        if key == "policy.name":
            tree["policy"] = {"name": value}
        else:
            (tree[section] if section else tree)[name] = plain
    run = TrainConfig.model_validate(tree)
    assert lines
    assert missing(estimate(recipe, run, int(counts[0]) if counts else 1), run) <= 0


def test_what_changes_no_number_is_advised_before_what_does():
    recipe = recipe_of(gpu_memory_gb=24.0)
    lines = advice(estimate(recipe, recipe.train), recipe, recipe.train)
    keys = [re.findall(r"train\.(\S+)=", line)[0] for line in lines]
    assert keys == ["clips_per_pass", "chunk_by_chunk", "gradient_checkpointing", "policy.offload", "policy.name"]


def test_advice_tells_what_a_change_saves():
    recipe = recipe_of(**LORA, gpu_memory_gb=80.0)
    parts = estimate(recipe, recipe.train)
    (line,) = advice(parts, recipe, recipe.train)[:1]
    count, saved = re.match(r"--set train\.clips_per_pass=(\d+) saves ([0-9.]+) GiB: ", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
    after = estimate(recipe, recipe.train.model_copy(update={"clips_per_pass": int(count)}))
    assert float(saved) == pytest.approx((total(parts) - total(after)) / GIB, abs=0.06)


def test_what_fits_gets_no_advice():
    recipe = recipe_of(**LORA, **LIGHT, gpu_memory_gb=80.0)
    assert advice(estimate(recipe, recipe.train), recipe, recipe.train) == []
    assert any("of 80 GB: fits" in line for line in table(recipe, recipe.train))


def test_a_student_that_no_setting_makes_fit_is_called_too_large():
    recipe = recipe_of({"size": "14B"}, gpu_memory_gb=4.0)
    assert "a smaller student" in advice(estimate(recipe, recipe.train), recipe, recipe.train)[-1]


def test_a_tiny_run_gets_one_line(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert table(recipe, recipe.train) == ["memory about 0.0 GiB"]
