"""Policies over one network, averages, schedules, and the one optimiser step."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from afd_train.config import FullConfig, LoraConfig, TrainConfig
from afd_train.objective_config import AfdConfig, FlowMatchingConfig
from afd_train.optimizer import Optimizer, learning_rate_factor
from afd_train.parallel import Processes, open_accelerator
from afd_train.policies import Policy, Trainee, frozen_copy, lora_targets, old_policy_decay, plain_state
from afd_train.students import Student

LORA = LoraConfig(rank=3, alpha=6.0)
AFD: tuple[Policy, ...] = ("old", "reference")
EVERY: tuple[Policy, ...] = ("student", "ema", *AFD)
OBJECTIVE = FlowMatchingConfig()
ONE = Processes(open_accelerator(), TrainConfig())  # process


def config(**settings) -> TrainConfig:
    return TrainConfig(objective=OBJECTIVE, **settings)


def line(*weights: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear map with these weights and no bias."""
    net = nn.Linear(len(weights), 1, bias=False, dtype=dtype)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([weights]))
    return net


def optimizer_of(net: nn.Module, max_grad_norm: float = 1e9, weight_decay: float = 0.0) -> Optimizer:
    return Optimizer(list(net.parameters()), ONE, max_grad_norm, weight_decay, betas=(0.9, 0.99))


def values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies."""
    return [tensor.detach().clone() for tensor in tensors]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    return values([master.grad for master in optimizer.masters if master.grad is not None])


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Averages and schedules.


def test_a_frozen_copy_stays_where_it_was():
    net = line(2.0)
    frozen = frozen_copy(net)
    with torch.no_grad():
        net.weight.fill_(5.0)
    assert frozen.weight.tolist() == [[2.0]]
    assert not frozen.weight.requires_grad
    assert not frozen.training
    assert net.weight.requires_grad


def test_the_learning_rate_rises_over_the_warmup():
    found = [learning_rate_factor(step, config(steps=10**9, warmup_steps=3)) for step in range(5)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_without_warmup_it_starts_at_its_full_value():
    assert learning_rate_factor(0, config(steps=10, warmup_steps=0)) == 1


def test_the_learning_rate_falls_along_a_cosine_to_its_final_share():
    settings = config(steps=101, warmup_steps=0, final_learning_rate=0.2)
    # Half way the cosine is 1/2: 0.2 + 0.8 / 2; a third of the way cos 60 degrees = 1/2: 0.2 + 0.8 x 3/4.
    assert learning_rate_factor(50, settings) == pytest.approx(0.6)
    assert learning_rate_factor(100, settings) == pytest.approx(0.2)
    assert learning_rate_factor(100 // 3, settings) == pytest.approx(0.8, abs=0.01)


def test_the_default_keeps_the_learning_rate():
    assert learning_rate_factor(199, config(steps=200)) == 1


def test_a_run_of_one_step_has_a_learning_rate():
    assert learning_rate_factor(0, config(steps=1, warmup_steps=0, final_learning_rate=0.0)) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("ema", {1: 0.9, 1000: 0.9}),
        ("copy", {1: 0.0, 1000: 0.0}),
        ("ramp", {1: 0.001, 100: 0.1, 500: 0.5, 501: 0.5, 10**6: 0.5}),
        # 0.0075 x 1, x 100, x 133 = 0.9975; x 134 = 1.005 is cut.
        ("late-ramp", {1: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 10**6: 0.999}),
    ],
)
def test_the_old_policys_decay_follows_its_schedule(schedule, expected):
    settings = AfdConfig(old_policy_schedule=schedule, old_policy_decay=0.9)
    assert {step: old_policy_decay(settings, step) for step in expected} == pytest.approx(expected, abs=1e-12)


# The optimiser.


def test_a_step_clips_the_gradient_and_reports_its_norm_before():
    net = line(0.0, 0.0)
    optimizer, clipped = optimizer_of(net, max_grad_norm=1.0), []
    optimizer.adamw.register_step_pre_hook(lambda *_: clipped.extend(gradients_of(optimizer)))
    optimizer.accumulate(net(torch.tensor([[30.0, 40.0]])).sum())
    assert optimizer.step(1.0) == pytest.approx(50)
    assert_close(clipped[0], torch.tensor([[0.6, 0.8]]), rtol=1e-4, atol=0)


def test_a_gradient_below_the_limit_is_left_alone():
    net = line(0.0)
    optimizer, seen = optimizer_of(net, max_grad_norm=10.0), []
    optimizer.adamw.register_step_pre_hook(lambda *_: seen.extend(gradients_of(optimizer)))
    optimizer.accumulate(net(torch.tensor([[2.0]])).sum())
    optimizer.step(1.0)
    assert seen[0].tolist() == [[2.0]]


def test_a_step_forgets_the_gradient_of_the_step_before():
    net = line(0.0)
    optimizer, norms = optimizer_of(net), []
    for _ in range(2):
        optimizer.accumulate(net(torch.tensor([[2.0]])).sum())
        norms.append(optimizer.step(1.0))
    assert norms == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_that_are_accumulated_count_as_their_sum(dtype):
    parts, whole = line(1.0, 2.0, dtype=dtype), line(1.0, 2.0, dtype=dtype)
    optimizers = optimizer_of(parts), optimizer_of(whole)
    a, b = torch.tensor([[3.0, 1.0]], dtype=dtype), torch.tensor([[1.0, 3.0]], dtype=dtype)
    for x in (a, b):
        optimizers[0].accumulate(parts(x).sum())
    optimizers[1].accumulate(whole(a).sum() + whole(b).sum())
    gradients = [optimizer.masters[0].grad for optimizer in optimizers]
    assert all(gradient is not None and gradient.tolist() == [[4.0, 4.0]] for gradient in gradients)
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert [optimizer.step(0.5) for optimizer in optimizers] == pytest.approx([math.sqrt(32)] * 2)
    assert torch.equal(parts.weight, whole.weight)


def test_parts_of_a_gradient_that_bfloat16_cannot_add_are_added_in_float32():
    net = line(0.0, dtype=torch.bfloat16)
    optimizer = optimizer_of(net)
    for part in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        optimizer.accumulate(net(torch.tensor([[part]], dtype=torch.bfloat16)).sum())
    assert optimizer.masters[0].grad is not None
    assert optimizer.masters[0].grad.item() == 258


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_checkpoint_keeps_of_another_network_is_exact_and_restores_it_in_place(dtype):
    nets = [nn.Sequential(nn.Linear(2, 2, dtype=dtype), nn.LayerNorm(2)) for _ in "ab"]
    optimizers = [optimizer_of(net) for net in nets]
    with torch.no_grad():
        optimizers[0].masters[0].fill_(0.5 - 2**-12)  # between two numbers of bfloat16
    wanted, restored = (optimizer.exact(net) for optimizer, net in zip(optimizers, nets, strict=True))
    assert wanted.keys() == nets[0].state_dict().keys()
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in wanted.values())
    for name, value in restored.items():
        value.copy_(wanted[name])
    optimizers[1].synchronise()
    assert same(optimizers[1].masters, optimizers[0].masters)
    assert nets[1].state_dict()["0.weight"].unique().tolist() == [0.5 - 2**-12 if dtype == torch.float32 else 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_weights(bad, dtype):
    net = line(1.0, dtype=dtype)
    optimizer = optimizer_of(net, max_grad_norm=1.0)
    optimizer.accumulate(net(torch.tensor([[bad]], dtype=dtype)).sum())
    assert not math.isfinite(optimizer.step(1.0))
    assert net.weight.tolist() == optimizer.masters[0].tolist() == [[1.0]]
    assert not optimizer.adamw.state
    optimizer.accumulate(net(torch.tensor([[2.0]], dtype=dtype)).sum())
    assert optimizer.step(1.0) == 2  # nothing of it is left


def test_float32_weights_move_as_torchs_adamw_moves_them():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    oracle = frozen_copy(ours).requires_grad_(True)
    optimizer = optimizer_of(ours, max_grad_norm=0.5, weight_decay=0.1)
    adamw = torch.optim.AdamW(oracle.parameters(), lr=1.0, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(5):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.accumulate(3 * ours(x).square().mean())
        norm = optimizer.step(0.01 * (step + 1))
        adamw.zero_grad()
        (3 * oracle(x).square().mean()).backward()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)))
        adamw.param_groups[0]["lr"] = 0.01 * (step + 1)
        adamw.step()
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=1e-7)


# Policies.


@pytest.fixture
def trainee_of(tiny_student) -> Callable[..., Trainee]:
    """`trainee_of(LORA, student={"dtype": "bfloat16"}, seed=0, learning_rate=1e-3, ...)` with all policies."""

    def make(
        policy: FullConfig | LoraConfig | None = None, student: dict | None = None, seed: int = 0, **settings
    ) -> Trainee:
        made = config(**({"warmup_steps": 0, "weight_decay": 0.0} | settings), policy=policy or FullConfig())
        return Trainee(tiny_student(**(student or {})).net, made, ONE, seed, AFD)

    return make


def moved(trainee: Trainee, seed: int = 1) -> Trainee:
    """In place: every policy that has weights of its own somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensors in (trainee.optimizer.masters, *trainee.copies.values()):
            for tensor in tensors:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.device)
    trainee.optimizer.synchronise()
    return trainee


@torch.no_grad()
def output(trainee: Trainee, policy: Policy = "student") -> Tensor:
    """What a policy says to some input."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 48, 4, 4, generator=generator), torch.full((1, 4), 0.5)
    text = torch.randn(1, 6, 16, generator=generator)
    with trainee.acting(policy) as net:
        return net(x, t, text)


POLICIES = pytest.mark.parametrize("policy", [FullConfig(), FullConfig(offload=True), LORA], ids=lambda p: repr(p))


def test_an_update_moves_by_the_scheduled_rate_and_the_average_follows(trainee_of):
    trainee = trainee_of(steps=10, warmup_steps=1, learning_rate=1e-3, evaluation_ema=0.9)
    weight = trainee.net.transformer.patch_embedding.bias
    assert weight is not None
    before = weight.detach().clone()
    trainee.accumulate(weight.sum())
    trainee.step(0)
    # Adam's first step is the learning rate, half of 1e-3 in the first of two warm-up steps.
    assert_close(weight.detach(), before - 5e-4, rtol=0, atol=1e-7)
    average = trainee.copies["ema"][trainee.names.index("transformer.patch_embedding.bias")]
    assert_close(average, before - 5e-5, rtol=0, atol=1e-7)
    assert not average.requires_grad


@POLICIES
@pytest.mark.parametrize("name", ["ema", "old"])
def test_a_policy_moves_by_one_minus_the_decay(trainee_of, policy, name):
    trainee = trainee_of(policy)
    with torch.no_grad():
        for mean, master in zip(trainee.copies[name], trainee.optimizer.masters, strict=True):
            mean.fill_(-1.0)
            master.fill_(1.0)
    trainee.follow(name, 0.75)
    assert {float(value) for mean in trainee.copies[name] for value in mean.unique()} == {-0.5}  # 0.75 x -1 + 0.25 x 1


@POLICIES
def test_decay_0_copies_the_student(trainee_of, policy):
    trainee = moved(trainee_of(policy))
    trainee.follow("old", 0.0)
    assert same(trainee.copies["old"], trainee.optimizer.masters)


@POLICIES
@pytest.mark.parametrize("acting", EVERY)
def test_weights_are_restored_bit_for_bit_after_another_policy_acted(trainee_of, policy, acting):
    trainee = moved(trainee_of(policy))
    before, said = values(list(trainee.net.parameters())), output(trainee)
    with trainee.acting(acting) as net:
        assert net is trainee.net
        assert same(list(net.parameters()), before) == (acting == "student" or (acting, policy) == ("reference", LORA))
    assert same(list(trainee.net.parameters()), before)
    assert torch.equal(output(trainee), said)
    if acting != "student":
        assert not torch.equal(output(trainee, acting), said)


@POLICIES
@pytest.mark.parametrize("acting", AFD)
def test_weights_are_restored_bit_for_bit_after_an_error(trainee_of, policy, acting):
    trainee = moved(trainee_of(policy))
    before, said = values(list(trainee.net.parameters())), output(trainee)
    with pytest.raises(KeyError, match="mine"), trainee.acting(acting):
        raise KeyError("mine")
    assert same(list(trainee.net.parameters()), before)
    assert torch.equal(output(trainee), said)


@POLICIES
@pytest.mark.parametrize("acting", AFD)
def test_what_is_trained_stays_so_after_another_policy_acted(trainee_of, policy, acting):
    trainee = trainee_of(policy)
    with trainee.acting(acting):
        pass
    assert [name for name, weight in trainee.net.named_parameters() if weight.requires_grad] == trainee.names


@POLICIES
def test_only_the_student_acts_with_gradient(trainee_of, policy):
    trainee = trainee_of(policy)
    for acting in EVERY:
        with trainee.acting(acting):
            assert torch.is_grad_enabled() == (acting == "student")
    assert torch.is_grad_enabled()


def test_a_policy_cannot_act_while_another_does(trainee_of):
    trainee = trainee_of()
    for second in EVERY:
        with (
            trainee.acting("old"),
            pytest.raises(RuntimeError, match=f"policy old is acting; it must end before {second}"),
            trainee.acting(second),
        ):
            raise AssertionError("never reached")
    with trainee.acting("reference"):
        pass  # and nothing is left of it


def test_nothing_is_trained_while_another_policy_acts(trainee_of):
    trainee = trainee_of()
    weight = trainee.parameters[0]
    loss = weight.sum()
    with trainee.acting("old"):
        with pytest.raises(AssertionError):
            trainee.accumulate(loss)
        with pytest.raises(AssertionError):
            trainee.step(0)
    assert weight.grad is None


def test_a_graph_from_before_another_policy_acted_is_refused(trainee_of):
    trainee = moved(trainee_of())
    loss = trainee.net(torch.ones(1, 4, 48, 4, 4), torch.ones(1, 4), torch.ones(1, 6, 16)).square().sum()
    with trainee.acting("old"):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trainee.accumulate(loss)


def test_policies_that_no_objective_needs_are_not_kept(tiny_student):
    assert Trainee(tiny_student().net, config(), ONE).copies.keys() == {"ema"}
    assert Trainee(tiny_student().net, config(), ONE, policies=AFD).copies.keys() == {"ema", *AFD}
    assert Trainee(tiny_student().net, config(policy=LORA), ONE, policies=AFD).copies.keys() == {"ema", "old"}


@POLICIES
def test_the_reference_stays_while_the_student_learns(trainee_of, policy):
    trainee = trainee_of(policy, learning_rate=1e-2)
    start = output(trainee)
    for step in range(2):
        trainee.accumulate(torch.stack([weight.square().sum() for weight in trainee.parameters]).sum())
        trainee.step(step)
        trainee.follow("old", 0.5)
    assert torch.equal(output(trainee, "reference"), start)
    if policy != LORA:  # whose other factor is 0 and gets no gradient from this loss
        assert not torch.equal(output(trainee), start)


# Weights in bfloat16.


def bfloat16(trainee: Trainee) -> list[int]:
    """Where the weights are in bfloat16."""
    return [i for i, weight in enumerate(trainee.parameters) if weight.dtype == torch.bfloat16]


@pytest.mark.parametrize("policy", [FullConfig(), LORA], ids=lambda p: p.name)
def test_steps_below_bfloat16s_resolution_add_up(trainee_of, policy):
    rate, steps = 1e-5, 100
    trainee = trainee_of(policy, {"dtype": "bfloat16"}, learning_rate=rate, evaluation_ema=0.5)
    rounded = bfloat16(trainee)
    assert rounded
    with torch.no_grad():
        for index in rounded:
            trainee.optimizer.masters[index].fill_(0.5)
            trainee.copies["ema"][index].fill_(0.5)
    trainee.optimizer.synchronise()
    weight = trainee.parameters[rounded[0]]
    # Neighbours of 0.5 in bfloat16 are 0.5 + 2^-8 and 0.5 - 2^-9 = 0.5 - 0.00195: a step alone is rounded away.
    assert torch.equal(weight - rate, weight)
    for step in range(steps):
        trainee.accumulate(torch.stack([trainee.parameters[index].float().sum() for index in rounded]).sum())
        trainee.step(step)
    for index in rounded:
        master, mean = trainee.optimizer.masters[index], trainee.copies["ema"][index]
        assert master.dtype == mean.dtype == torch.float32
        # Adam's steps are the rate where the gradient is constant: 0.5 - 100 x 1e-5; the average lags one step.
        assert_close(master.detach(), torch.full_like(master, 0.499), rtol=0, atol=2e-6)
        assert_close(mean, torch.full_like(mean, 0.49901), rtol=0, atol=2e-6)
        assert torch.equal(trainee.parameters[index], master.bfloat16())
    assert weight.flatten()[0] == 0.498046875  # 0.5 - 2^-9 is nearer to 0.499 than 0.5


def test_norms_and_modulation_of_a_bfloat16_network_are_their_own_masters(trainee_of):
    trainee = trainee_of(student={"dtype": "bfloat16"})
    pairs = list(zip(trainee.parameters, trainee.optimizer.masters, strict=True))
    assert {weight.dtype for weight, _ in pairs} == {torch.float32, torch.bfloat16}
    assert all((weight is master) == (weight.dtype == torch.float32) for weight, master in pairs)
    assert all(master.dtype == torch.float32 for _, master in pairs)


def test_a_bfloat16_network_shows_the_rounded_masters_of_the_policy_that_acts(trainee_of):
    trainee = moved(trainee_of(student={"dtype": "bfloat16"}))
    for policy in ("ema", *AFD):
        with trainee.acting(policy) as net:
            for weight, exact in zip(net.parameters(), trainee.copies[policy], strict=True):
                assert torch.equal(weight, exact.to(weight.dtype))
    for weight, master in zip(trainee.parameters, trainee.optimizer.masters, strict=True):
        assert torch.equal(weight, master.to(weight.dtype))


# Adapters.


def adapted(trainee: Trainee) -> list[str]:
    """Linear layers with an adapter."""
    return [name.removesuffix(".lora_A.default.weight") for name in trainee.names if ".lora_A." in name]


def test_only_adapters_are_trained(trainee_of):
    trainee = trainee_of(LORA)
    assert all(".lora_A." in name or ".lora_B." in name for name in trainee.names)
    assert trainee.names == [name for name, weight in trainee.net.named_parameters() if weight.requires_grad]
    assert trainee.names == [name for name, _ in trainee.net.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("attention", 8),  # query, key, value and output, of self- and of cross-attention
        ("all", 10),  # and both layers of the feed-forward network
    ],
)
def test_targets_name_the_layers_of_a_block_that_are_adapted(trainee_of, targets, layers):
    settings = LoraConfig(rank=3, alpha=6.0, targets=targets)
    trainee = trainee_of(settings)
    found = adapted(trainee)
    assert len(found) == 2 * layers  # blocks
    assert len(trainee.names) == 2 * len(found)
    assert all(".blocks." in name for name in found)
    assert all(any(name.endswith("." + target) for target in lora_targets(settings)) for name in found)
    assert any("ffn" in name for name in found) == (targets == "all")
    assert {min(weight.shape) for weight in trainee.parameters} == {3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_nothing(tiny_student, dtype):
    student: Student = tiny_student(dtype=dtype)
    plain = Trainee(tiny_student(dtype=dtype).net, config(), ONE)
    with_adapter = Trainee(student.net, config(policy=LORA), ONE, policies=AFD)
    assert torch.equal(output(with_adapter), output(plain))
    b = [p for name, p in zip(with_adapter.names, with_adapter.parameters, strict=True) if ".lora_B." in name]
    assert b
    assert not any(weight.any() for weight in b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_of_an_adapted_network_is_the_network_before_adapters(tiny_student, dtype):
    plain = Trainee(tiny_student(dtype=dtype).net, config(), ONE)
    trainee = moved(Trainee(tiny_student(dtype=dtype).net, config(policy=LORA), ONE, policies=AFD))
    assert not torch.equal(output(trainee), output(plain))
    assert torch.equal(output(trainee, "reference"), output(plain))


def test_adapters_of_equal_seeds_are_equal_and_of_others_are_not(trainee_of):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (trainee_of(LORA, seed=seed) for seed in (0, 0, 1))
    assert same(first.parameters, again.parameters)
    assert not same(first.parameters, other.parameters)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_is_in_the_type_of_the_weights_it_adapts(trainee_of):
    trainee = trainee_of(LORA, {"dtype": "bfloat16"})
    assert {weight.dtype for weight in trainee.parameters} == {torch.bfloat16}
    assert {master.dtype for master in trainee.optimizer.masters} == {torch.float32}


def test_an_adapter_moves_the_network_by_alpha_over_rank(tiny_student):
    name = "transformer.blocks.1.attn2.to_q"
    plain = tiny_student().net.get_parameter(f"{name}.weight").detach()
    trainee = moved(Trainee(tiny_student().net, config(policy=LORA), ONE))
    layer, weights = trainee.net.get_submodule(name), dict(trainee.net.named_parameters())
    a, b = (weights[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    expected = x @ (plain + 6 / 3 * b @ a).T + weights[f"{name}.base_layer.bias"]
    assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_the_adapter_of_the_policy_that_acts_is_what_would_be_saved(trainee_of):
    trainee = moved(trainee_of(LORA))
    kept: dict[Policy, Sequence[Tensor]] = {"student": trainee.parameters, "old": trainee.copies["old"]}
    for policy, tensors in kept.items():
        with trainee.acting(policy):
            state = trainee.adapter_state()
            assert state is not None
            names = [name.removeprefix("transformer.").replace(".default", "") for name in trainee.names]
            assert state.keys() == set(names)
            assert same([state[name] for name in names], tensors)


def test_a_network_that_is_trained_whole_has_no_adapter(trainee_of):
    assert trainee_of().adapter_state() is None


def test_the_plain_weights_of_an_adapted_network_are_those_before(tiny_student):
    net = tiny_student().net
    before = {name: value.clone() for name, value in net.transformer.state_dict().items()}
    trainee = moved(Trainee(net, config(policy=LORA), ONE))
    state = plain_state(trainee.net)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())


# Where copies live, and checkpoints.


def test_offloaded_copies_stand_in_the_cpus_memory_and_are_no_views_of_the_network(trainee_of):
    trainee = trainee_of(FullConfig(offload=True))
    own = {weight.data_ptr() for weight in trainee.parameters}
    for tensors in trainee.copies.values():
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert not own & {tensor.data_ptr() for tensor in tensors}


def test_offloading_changes_no_number(trainee_of):
    found = []
    for offload in (False, True):
        trainee = trainee_of(FullConfig(offload=offload), learning_rate=1e-3, evaluation_ema=0.5)
        for step in range(2):
            with trainee.acting("old") as net:
                target = net.transformer.proj_out.weight.detach().clone()
            loss = (trainee.net.transformer.proj_out.weight - 2 * target).square().sum()
            trainee.accumulate(loss)
            trainee.step(step)
            trainee.follow("old", 0.5)
        found.append([*trainee.parameters, *(t for name in ("ema", *AFD) for t in trainee.copies[name])])
    assert same(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("offload", [False, True])
def test_copies_of_a_network_on_a_gpu_stand_where_they_should(tiny_student, offload):
    settings = config(policy=FullConfig(offload=offload))
    trainee = moved(Trainee(tiny_student().net.cuda(), settings, ONE, policies=AFD))
    devices = {tensor.device.type for tensors in trainee.copies.values() for tensor in tensors}
    assert devices == {"cpu" if offload else "cuda"}
    before = values(trainee.parameters)
    with trainee.acting("old") as net:
        assert {weight.device.type for weight in net.parameters()} == {"cuda"}
        assert not same(list(net.parameters()), before)
    trainee.follow("old", 0.0)
    assert same([tensor.cuda() for tensor in trainee.copies["old"]], trainee.parameters)


@pytest.mark.parametrize("policy", [FullConfig(), LORA], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restoring_the_state_in_place_restores_every_policy(trainee_of, policy, dtype):
    wanted, restored = (moved(trainee_of(policy, {"dtype": dtype}), seed) for seed in (1, 2))
    assert not torch.equal(output(restored), output(wanted))
    with torch.no_grad():
        for name, tensors in restored.state().items():
            for key, tensor in tensors.items():
                tensor.copy_(wanted.state()[name][key])
    restored.optimizer.synchronise()
    assert same(restored.optimizer.masters, wanted.optimizer.masters)
    for acting in ("student", "ema", "old"):
        assert torch.equal(output(restored, acting), output(wanted, acting))


def test_the_state_holds_all_that_moves_and_not_the_reference(trainee_of):
    trainee = trainee_of()
    state = trainee.state()
    assert state.keys() == {"student", "ema", "old"}
    assert all(list(tensors) == trainee.names for tensors in state.values())
    assert not any(tensor.requires_grad for tensors in state.values() for tensor in tensors.values())
