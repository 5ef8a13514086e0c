"""The student's update: every way to compute it gives one gradient, and that gradient is the paper's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from afd_train import draws
from afd_train.config import LoraConfig
from afd_train.flow import nearest_time, noised, velocity
from afd_train.losses import forward_process_loss, prior_loss
from afd_train.objective_config import AfdConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.forward_process import ForwardProcess, Step
from afd_train.policies import Trainee
from afd_train.rollout import Sampler
from afd_train.students import Clip
from tests.dense_wan import oracle_of, stirred

PROMPTS, TAKES, FRAMES, CHUNK = 3, 4, 4, 2
NUMBER = 6  # of the step; take 6 % 4 = 2 of every prompt is compared with the reference
STUDENT: dict[str, Any] = {"layers": 2, "steps": (1000, 500)}
STILL: dict[str, Any] = {"learning_rate": 1e-30, "max_grad_norm": 1e9}  # a step that no weight feels


def moved(trainee: Trainee, size: float = 0.02) -> None:
    """In place: the student and every policy beside it somewhere else."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in (trainee.optimizer.masters, *trainee.copies.values()):
            for tensor in tensors:
                tensor += size * torch.randn(tensor.shape, generator=generator)
    trainee.optimizer.synchronise()


@dataclass
class World:
    """A setup whose student, old policy and reference differ, with what it is asked to learn from."""

    setup: Setup
    drawn: Step
    weight: Tensor  # [P K]

    def update(self, objective: AfdConfig, **settings: Any) -> tuple[Tensor, Metrics]:
        """The gradient, all weights in a row, and the log of an update that moves nothing."""
        setup = self.changed(objective, **settings)
        drawn = self.drawn if setup.config.clips_per_pass is None else replace(self.drawn, cache=None)
        with gradient_of(setup.trainee) as gradient:
            metrics = ForwardProcess(setup, objective).update(drawn, self.weight[:, None])
        return gradient[0], metrics

    def changed(self, objective: AfdConfig, **settings: Any) -> Setup:
        """The setup with another configuration; the networks are the same ones."""
        config = self.setup.config.model_copy(update={"objective": objective, **settings})
        transformer = self.setup.student.net.transformer
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        return replace(self.setup, config=config)


@contextmanager
def gradient_of(trainee: Trainee) -> Iterator[list[Tensor]]:
    """What the optimiser is given in this block, once a step."""
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in trainee.optimizer.masters]
        found.append(torch.cat([gradient.detach().flatten() for gradient in gradients]))

    hook = trainee.optimizer.adamw.register_step_pre_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@pytest.fixture
def world_of(setup_of) -> Callable[..., World]:
    """`world_of(student={...}, policy=LoraConfig(), ...)` -> a `World`; further settings are those of `TrainConfig`."""

    def make(student: dict[str, Any] | None = None, **settings: Any) -> World:
        setup = setup_of(AfdConfig(), student=STUDENT | (student or {}), **(STILL | settings))
        stirred(setup.student.net)
        moved(setup.trainee)
        examples = setup.stream.next_batch(PROMPTS)
        weight = torch.rand(PROMPTS * TAKES, generator=torch.Generator().manual_seed(2))
        return World(setup, Step.drawn(setup, examples, NUMBER), weight)

    return make


def assert_same(found: tuple[Tensor, Metrics], expected: tuple[Tensor, Metrics]) -> None:
    """Gradients to 1e-6 of their norm, logs to 1e-5."""
    gradient, wanted = found[0], expected[0]
    assert wanted.norm() > 0
    assert float((gradient - wanted).norm() / wanted.norm()) < 1e-6
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert all(value > 0 for value in found[1].values())


# All forms of one update.


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("per_pass", [1, 2, 3, 5, 8, None])
def test_the_gradient_is_that_of_the_whole_step_at_once(world_of, copies, per_pass):
    world, objective = world_of(), AfdConfig(noisings_per_clip=copies, prior_weight=0.5)
    expected = world.update(objective)
    for chunk_by_chunk in (False, True):
        for checkpointing in (False, True):
            settings = {"chunk_by_chunk": chunk_by_chunk, "gradient_checkpointing": checkpointing}
            assert_same(world.update(objective, clips_per_pass=per_pass, **settings), expected)


@pytest.mark.parametrize("per_pass", [1, 5])
def test_a_second_inner_update_sees_the_student_that_the_first_one_made(world_of, per_pass):
    objective, second = AfdConfig(inner_updates=2, prior_weight=0.5), []
    for limit in (None, per_pass):
        world = world_of(learning_rate=1e-2, warmup_steps=0)
        setup = world.changed(objective, clips_per_pass=limit)
        drawn = world.drawn if limit is None else replace(world.drawn, cache=None)
        with gradient_of(setup.trainee) as gradients:
            ForwardProcess(setup, objective).update(drawn, world.weight[:, None])
        assert len(gradients) == 2
        second.append(gradients[1])
    assert float((second[1] - second[0]).norm() / second[0].norm()) < 1e-4  # Adam makes much of the first's rounding


@pytest.mark.parametrize("per_pass", [1, 5, None])
def test_teacher_forcing_gives_one_gradient_in_parts_or_at_once(world_of, per_pass):
    world, objective = world_of(), AfdConfig(noisings_per_clip=2, prior_weight=0.5, context_gradient=True)
    expected = world.update(objective)
    for checkpointing in (False, True):
        assert_same(world.update(objective, clips_per_pass=per_pass, gradient_checkpointing=checkpointing), expected)


@pytest.mark.parametrize("per_pass", [2, 5, None])
def test_an_adapters_gradient_is_that_of_the_whole_step_at_once(world_of, per_pass):
    world, objective = world_of(policy=LoraConfig(rank=3, alpha=6.0)), AfdConfig(noisings_per_clip=2, prior_weight=0.5)
    expected = world.update(objective)
    for checkpointing in (False, True):
        settings = {"chunk_by_chunk": True, "gradient_checkpointing": checkpointing}
        assert_same(world.update(objective, clips_per_pass=per_pass, **settings), expected)


@pytest.mark.parametrize("student", [{"window": 2}, {"chunk_frames": 1, "window": 3, "sink": 1}], ids=str)
def test_a_window_changes_nothing_of_that(world_of, student):
    world, objective = world_of(student), AfdConfig(noisings_per_clip=2)
    expected = world.update(objective)
    assert_same(world.update(objective, clips_per_pass=3, chunk_by_chunk=True), expected)


@pytest.mark.parametrize("per_pass", [1, 3, 5])
@pytest.mark.parametrize("renoised", ["never", "training"])
def test_rollouts_in_parts_are_those_drawn_at_once(world_of, per_pass, renoised):
    world = world_of({"renoised_context": renoised})
    whole = world.drawn
    assert whole.cache is not None
    drawn = Step.drawn(world.changed(AfdConfig(), clips_per_pass=per_pass), whole.examples, NUMBER)
    assert drawn.cache is None
    assert_close(drawn.clips, whole.clips, rtol=0, atol=1e-5)
    assert_close(drawn.context, whole.context, rtol=0, atol=1e-5)


def test_the_clips_of_a_step_stand_by_prompt_then_take(world_of):
    world = world_of()
    setup, drawn = world.setup, world.drawn
    for row, (example, take) in enumerate((e, take) for e in drawn.examples for take in range(TAKES)):
        alone = setup.rollout([example], NUMBER, range(take, take + 1)).clips
        assert_close(drawn.clips[row : row + 1], alone, rtol=0, atol=1e-5)


# What that gradient is.


@dataclass(frozen=True)
class Version:
    """The step's clips noised once, made here from the step's draws: [P K, F, C, H, W], times [P K, F]."""

    noisy: Tensor
    t: Tensor
    target: Tensor


def versions_of(world: World, copies: int) -> list[Version]:
    """All versions of the clips."""
    student, drawn = world.setup.student, world.drawn
    draws = world.setup.draws(NUMBER, "forward process", drawn.examples, range(TAKES))
    sampler = Sampler.of(student.config, training=True)
    where = draws.uniform(copies)
    noise = draws.normal(copies * FRAMES, *student.shape[1:]).unflatten(1, (copies, FRAMES))
    of_chunks = [sampler.first_times] + [sampler.times] * (student.chunks - 1)
    found = []
    for copy in range(copies):
        rows = [[times[int(share * len(times))] for times in of_chunks] for share in where[:, copy].tolist()]
        t = torch.tensor(rows).repeat_interleave(student.config.chunk_frames, 1)
        found.append(Version(noised(drawn.clips, noise[:, copy], t), t, velocity(drawn.clips, noise[:, copy])))
    return found


@dataclass(frozen=True)
class Seen:
    """What every version is computed with: the context, which nobody sees the last chunk of, its times, the text."""

    clean: Tensor
    t: Tensor
    text: Tensor  # [P, L, D]


def seen_of(world: World) -> Seen:
    drawn = world.drawn
    clean = torch.cat([drawn.context, drawn.clips[:, drawn.context.shape[1] :]], 1)
    t = torch.full(clean.shape[:2], world.setup.student.config.context_noise / 1000)
    return Seen(clean, t, world.setup.text(drawn.examples))


def expected(world: World, objective: AfdConfig, student: Callable[[Version, Seen], Tensor]) -> tuple[Tensor, Metrics]:
    """Eq. 5 and the log, from the pure losses on what a dense pass of every policy says.  [] with gradient."""
    versions, seen, trainee = versions_of(world, objective.noisings_per_clip), seen_of(world), world.setup.trainee
    said: dict[Any, list[Tensor]] = {"old": [], "reference": []}
    for policy, velocities in said.items():
        with trainee.acting(policy) as net:
            velocities += [net(v.noisy, v.t, seen.text, seen.clean, seen.t) for v in versions]
    rows = [prompt * TAKES + NUMBER % TAKES for prompt in range(PROMPTS)]
    v, v_old, v_reference, target = (
        torch.cat(parts, 1)
        for parts in ([student(v, seen) for v in versions], *said.values(), [v.target for v in versions])
    )
    loss = forward_process_loss(v, v_old, target, world.weight[:, None], objective.policy_mix)
    prior = prior_loss(v[rows], v_reference[rows])
    log = {
        "student/loss": float(loss.detach()),
        "student/old_policy_deviation": float((v - v_old).detach().square().mean()),
        "student/reference_distance": float(prior.detach() / v_reference[rows].square().mean()),
    }
    return loss + objective.prior_weight * prior, log


CASES = pytest.mark.parametrize(
    ("student", "copies"),
    [
        ({}, 1),
        ({}, 3),
        ({"first_chunk_steps": (1000, 750, 500, 250)}, 2),
        ({"chunk_frames": 1, "window": 3, "sink": 1}, 1),
        ({"renoised_context": "training", "context_noise": 100}, 2),
    ],
    ids=str,
)


@CASES
def test_with_a_context_that_carries_gradient_the_update_is_teacher_forcing(world_of, student, copies):
    world = world_of(student)
    objective = AfdConfig(noisings_per_clip=copies, prior_weight=0.5, context_gradient=True)
    gradient, metrics = world.update(objective)
    net, weights = world.setup.student.net, world.setup.trainee.parameters
    loss, log = expected(world, objective, lambda v, seen: net(v.noisy, v.t, seen.text, seen.clean, seen.t))
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
    assert_same((gradient, metrics), (wanted, log | {"student/grad_norm": float(wanted.norm())}))


@CASES
def test_without_it_the_update_is_a_dense_one_whose_context_is_detached(world_of, student, copies):
    world = world_of(student)
    objective = AfdConfig(noisings_per_clip=copies, prior_weight=0.5)
    config = world.setup.student.config
    oracle = oracle_of(world.setup.student.net, config.window, config.sink)

    def dense(version: Version, seen: Seen) -> Tensor:
        text = seen.text.repeat_interleave(TAKES, 0)
        return oracle.clean_context(version.noisy, version.t, text, seen.clean, seen.t, detached=True)

    loss, log = expected(world, objective, dense)
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(oracle.weights.values()))]).float()
    assert_same(world.update(objective), (wanted, log | {"student/grad_norm": float(wanted.norm())}))


def test_both_differ(world_of):
    world = world_of()
    detached, _ = world.update(AfdConfig())
    forced, _ = world.update(AfdConfig(context_gradient=True))
    assert float((detached - forced).norm()) > 0.01 * float(forced.norm())


# Its parts.


def test_one_take_of_every_prompt_is_compared_with_the_reference_each_in_its_turn(world_of):
    world = world_of()
    found = {}
    for number in range(2 * TAKES):
        world.drawn = replace(world.drawn, number=number)
        found[number] = world.update(AfdConfig())[1]["student/reference_distance"]
        other = world.update(AfdConfig(), clips_per_pass=3)[1]["student/reference_distance"]
        assert other == pytest.approx(found[number], rel=1e-5)
    assert len(set(found.values())) == 2 * TAKES  # times and noise are others too


def timesteps_seen(world: World, objective: AfdConfig) -> Tensor:
    """Times of the student's own passes, [P K, copies F]."""
    seen: list[Tensor] = []

    def keep(_: object, __: object, inputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            seen.append(inputs["timestep"].detach() / 1000)

    hook = world.setup.student.net.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    world.update(objective)
    hook.remove()
    (times,) = seen
    return times.unflatten(0, (PROMPTS * TAKES, -1))


def test_the_first_chunk_is_noised_to_times_of_its_own_sampler(world_of):
    world = world_of({"first_chunk_steps": (1000, 750, 500, 250)})
    copies = 8
    times = timesteps_seen(world, AfdConfig(noisings_per_clip=copies)).unflatten(1, (copies, FRAMES))
    sampler = Sampler.of(world.setup.student.config, training=True)
    assert (len(sampler.first_times), len(sampler.times)) == (4, 2)
    first, other = times[:, :, :CHUNK], times[:, :, CHUNK:]
    assert first.unique().tolist() == pytest.approx(sorted(sampler.first_times))
    assert other.unique().tolist() == pytest.approx(sorted(sampler.times))
    assert all(bool((part == part[:, :, :1]).all()) for part in (first, other))  # one time a chunk
    # The same share of the way: the first two of four steps go with the first of two.
    assert torch.equal(first[:, :, 0] > sampler.first_times[1] - 1e-6, other[:, :, 0] > sampler.times[0] - 1e-6)


def test_all_times_of_the_sampler_are_as_likely(world_of):
    times = timesteps_seen(world_of({"steps": (1000, 750, 500)}), AfdConfig(noisings_per_clip=50))
    shares = torch.tensor([float((times == time).float().mean()) for time in times.unique()])
    assert len(shares) == 3
    assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.06)  # 600 draws: 0.02


def test_a_clip_is_noised_the_same_whichever_clips_are_beside_it(world_of):
    world = world_of()
    passes: list[Tensor] = []

    def keep(_: object, __: object, inputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            passes.append(inputs["hidden_states"].detach().unflatten(0, (-1, 2 * FRAMES)))

    world.setup.student.net.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    objective = AfdConfig(noisings_per_clip=2)
    world.update(objective)
    whole = passes.pop()
    world.update(objective, clips_per_pass=3)
    assert len(passes) == 2 * PROMPTS  # three takes and one, of every prompt
    assert torch.equal(torch.cat(passes), whole)


# Policies.


def test_only_adapters_get_a_gradient_and_the_reference_has_none(world_of):
    world = world_of(policy=LoraConfig(rank=3, alpha=6.0))
    trainee = world.setup.trainee
    gradient, metrics = world.update(AfdConfig())
    assert len(gradient) == sum(weight.numel() for weight in trainee.parameters)
    assert gradient.norm() > 0
    assert all(weight.grad is None for weight in world.setup.student.net.parameters() if not weight.requires_grad)
    assert metrics["student/reference_distance"] > 0  # the student's adapter is somewhere else
    with torch.no_grad():
        for weight in trainee.parameters:
            weight.zero_()
    world.drawn = replace(world.drawn, cache=None)  # it holds keys and values of the adapter that was
    assert world.update(AfdConfig())[1]["student/reference_distance"] < 1e-9


def test_an_update_of_a_bfloat16_student_moves_its_masters(world_of):
    world = world_of({"dtype": "bfloat16"}, learning_rate=1e-5)
    masters = world.setup.trainee.optimizer.masters
    before = [master.detach().clone() for master in masters]
    metrics = ForwardProcess(world.setup, AfdConfig()).update(world.drawn, world.weight[:, None])
    assert metrics["student/grad_norm"] > 0
    changed = [not torch.equal(master, start) for master, start in zip(masters, before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)


# The context.

RENOISED: dict[str, Any] = {"renoised_context": "training", "context_noise": 300}


def test_a_student_that_was_trained_on_noised_chunks_remembers_noised_chunks(world_of):
    drawn, setup = world_of(RENOISED).drawn, world_of(RENOISED).setup
    level = nearest_time(0.3, setup.student.config.shift)
    clips = [Clip(e.prompt_id, e.prompt, NUMBER, take) for e in drawn.examples for take in range(TAKES)]
    noise = torch.stack(
        [
            torch.randn(CHUNK, 48, 4, 4, generator=draws.generator(clip.prompt_id, clip.seed, clip.take, "context"))
            for clip in clips
        ]
    )
    clean = drawn.clips[:, :CHUNK]
    assert_close(drawn.context, (1 - level) * clean + level * noise, rtol=0, atol=1e-6)
    assert not torch.equal(drawn.context, clean)


def test_others_remember_clean_chunks(world_of):
    drawn = world_of().drawn
    assert torch.equal(drawn.context, drawn.clips[:, :CHUNK])


@pytest.mark.parametrize("per_pass", [3, None])
def test_all_policies_see_what_the_student_remembered(setup_of, per_pass):
    # They are equal before the first step, so they say the same as long as they see the same.
    setup = setup_of(AfdConfig(), student=STUDENT | RENOISED, clips_per_pass=per_pass, **STILL)
    drawn = Step.drawn(setup, setup.stream.next_batch(PROMPTS), NUMBER)
    update, half = ForwardProcess(setup, AfdConfig()).update, torch.full((PROMPTS * TAKES, 1), 0.5)
    metrics = update(drawn, half)
    assert metrics["student/old_policy_deviation"] < 1e-9
    assert metrics["student/reference_distance"] < 1e-9
    if drawn.cache is not None:  # the student's own keys and values; others are given a context that is not his
        assert update(replace(drawn, context=drawn.clips[:, :CHUNK]), half)["student/old_policy_deviation"] > 1e-6
