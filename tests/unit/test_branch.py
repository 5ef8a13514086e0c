"""Branching: candidates that share a context, and one update in the place of one a candidate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from afd_train.advantages import clipped
from afd_train.discriminator_config import SpaceTimeConfig
from afd_train.discriminators import Prompts
from afd_train.discriminators.spacetime import SpaceTime
from afd_train.flow import clean_from_velocity, nearby
from afd_train.losses import branch_shift, branching_loss, forward_process_loss
from afd_train.objective_config import BranchConfig
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.branch import BranchedFlowDistillation, Noisy
from afd_train.objectives.branching import draw_branches

PROMPTS, MANY = 3, 4
MIX, CLIP = 0.1, 3.0


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def setup(setup_of) -> Setup:
    return branched(setup_of, learning_rate=1e-3)


def branched(setup_of: Callable[..., Setup], **settings: float) -> Setup:
    made = setup_of(BranchConfig(), student={"steps": (1000, 500)}, **settings)
    made.discriminator = SpaceTimeConfig(dim=16, heads=2, layers=1, chunk_causal=True, warmup_steps=2, warmup_prompts=4)
    return made


def test_one_regression_is_the_mean_of_eq_4_over_the_candidates():
    # At t = 1 all candidates share the network's input; there v = noise - clean.
    candidates, noise = drawn(0, MANY, 2, 4, 3, 2, 2), drawn(1, 2, 4, 3, 2, 2)
    advantages = clipped(drawn(2, 2, MANY, 4), CLIP).transpose(0, 1)[..., None, None, None]
    old = drawn(3, 2, 4, 3, 2, 2)
    student = drawn(4, 2, 4, 3, 2, 2).requires_grad_()
    losses = [
        forward_process_loss(noise - student, noise - old, noise - sample, advantage.flatten(1) / (2 * CLIP) + 0.5, MIX)
        for sample, advantage in zip(candidates, advantages, strict=True)
    ]
    (wanted,) = torch.autograd.grad(torch.stack(losses).mean(), student)
    shift = branch_shift(candidates, advantages, CLIP)
    loss = branching_loss(student, old, shift, torch.ones(2, 4, dtype=torch.float64), MIX)
    (found,) = torch.autograd.grad(loss, student)
    assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_shift_points_to_what_is_liked():
    # (2 / 4) (1 - 0) and (-2 / 4) (-1 - 0), averaged.
    shift = branch_shift(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0], [-2.0]]), clip=4.0)
    assert shift.tolist() == [0.5]


def test_the_shift_is_the_same_wherever_the_candidates_lie():
    candidates, advantages = drawn(0, MANY, 5), clipped(drawn(1, 1, MANY), CLIP).T
    assert_close(branch_shift(candidates + 7, advantages, CLIP), branch_shift(candidates, advantages, CLIP))


def test_the_first_candidates_are_a_rollout_as_any_other(setup):
    examples = setup.stream.next_batch(PROMPTS)
    branches, rollout = draw_branches(setup, examples, 5), setup.rollout(examples, 5, range(1))
    assert_close(branches.followed, rollout.clips, rtol=0, atol=1e-5)
    assert_close(branches.context, rollout.context, rtol=0, atol=1e-5)


def test_other_candidates_are_drawn_behind_the_followed_chunks(setup):
    """The second chunk of candidate 2, drawn again by itself."""
    examples, net, chunk = setup.stream.next_batch(PROMPTS), setup.student.net, 2
    branches = draw_branches(setup, examples, 5)
    noise = setup.student.noise(setup.clips(examples, 5, range(2, 3)))
    for _ in range(2):
        noise.step()
    text, times = setup.text(examples), (1.0, 5 * 0.5 / 3)
    cache = net.remember(branches.followed[:, :chunk], text, net.memory(2 * chunk))
    x = noise.step()
    t = torch.full(x.shape[:2], times[0])
    clean = clean_from_velocity(x, net.chunk(x, t, text, cache), t)
    t = torch.full(x.shape[:2], times[1])
    x = (1 - times[1]) * clean + times[1] * noise.step()
    clean = clean_from_velocity(x, net.chunk(x, t, text, cache), t)
    assert_close(branches.candidates[:, 2, chunk : 2 * chunk], clean, rtol=0, atol=1e-5)


def test_exchanged_noise_keeps_its_variance_and_a_known_correlation():
    noise, other = drawn(0, 100_000), drawn(1, 100_000)
    mixed = nearby(noise, other, 0.6)
    assert float(mixed.var()) == pytest.approx(1, abs=0.02)
    assert float(torch.corrcoef(torch.stack([noise, mixed]))[0, 1]) == pytest.approx(0.8, abs=0.01)
    assert torch.equal(nearby(noise, other, 1.0), other)


def test_candidates_lie_as_near_to_the_followed_one_as_their_noise(setup):
    examples = setup.stream.next_batch(PROMPTS)
    apart = {}
    for spread in (1e-3, 0.3, 1.0):
        branches = draw_branches(setup, examples, 5, spread)
        assert_close(branches.followed, draw_branches(setup, examples, 5).followed, rtol=0, atol=1e-5)
        apart[spread] = float((branches.candidates - branches.followed[:, None]).square().mean().sqrt())
    assert apart[1e-3] < 0.01 * apart[0.3] < 0.01 * apart[1.0]


@pytest.mark.parametrize("per_pass", [1, 4, 5, 8])
def test_branches_do_not_depend_on_how_many_are_drawn_at_once(setup, per_pass):
    examples = setup.stream.next_batch(PROMPTS)
    whole = draw_branches(setup, examples, 0)
    setup.config = setup.config.model_copy(update={"clips_per_pass": per_pass})
    assert_close(draw_branches(setup, examples, 0).candidates, whole.candidates, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [6, 2])
@pytest.mark.parametrize("settings", [{}, {"look_back": True}, {"reference": True, "look_back": True}])
def test_candidates_judged_together_score_as_each_clip_by_itself(tiny_student, settings, frames):
    student = tiny_student(frames=frames)
    config = SpaceTimeConfig(dim=16, heads=2, layers=2, chunk_causal=True, **settings)
    net = SpaceTime(config, student.shape, student.config).double()
    followed, candidates = drawn(0, PROMPTS, *student.shape), drawn(1, PROMPTS, MANY, *student.shape)
    reference = drawn(3, PROMPTS, *student.shape) if config.reference else None
    prompts = Prompts(["a"] * PROMPTS, drawn(2, PROMPTS, 6, 16))
    found = net.score_branches(followed, candidates, prompts, reference)
    for candidate in range(MANY):
        for chunk in range(frames // 2):
            clip, own = followed.clone(), slice(2 * chunk, 2 * chunk + 2)
            clip[:, own] = candidates[:, candidate, own]
            assert_close(net(clip, prompts, reference)[:, chunk], found[:, candidate, chunk], rtol=0, atol=1e-10)


def test_an_update_learns_from_branches_alone_and_logs_what_afd_logs(setup):
    objective = open_objective(setup)
    objective.prepare(lambda step, metrics: None)
    before = [weight.detach().clone() for weight in setup.trainee.parameters]
    metrics = objective.step(setup.stream.next_batch(PROMPTS), 0)
    assert {"discriminator/margin", "discriminator/held_out_margin", "advantage/spread"} <= metrics.keys()
    assert {"student/loss", "student/grad_norm", "student/reference_distance"} <= metrics.keys()
    assert any(not torch.equal(a, b) for a, b in zip(before, setup.trainee.parameters, strict=True))
    assert len(setup.margins.rows()) == PROMPTS


def test_advantages_of_a_branch_add_up_to_nothing_even_where_they_are_clipped(setup):
    objective = BranchedFlowDistillation(setup, BranchConfig(advantage_clip=0.5))
    found = objective._advantages(setup.stream.next_batch(PROMPTS), drawn(0, PROMPTS, MANY, 2), 0)
    assert float(found.abs().max()) <= 1
    assert_close(found.sum(1), torch.zeros(PROMPTS, 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_students_gradient_is_that_of_the_mean_over_single_candidates(setup):
    """Against eq. 4 on the network itself, candidate by candidate, all noised to t = 1."""
    setup.student.sample_as(setup.student.config.model_copy(update={"steps": (1000,)}))
    setup.config = setup.config.model_copy(update={"learning_rate": 1e-30, "max_grad_norm": 1e9})
    examples = setup.stream.next_batch(PROMPTS)
    objective = BranchedFlowDistillation(setup, BranchConfig(prior_weight=0.0))
    branches = draw_branches(setup, examples, 0)
    advantages = clipped(drawn(0, PROMPTS, MANY, 2).float(), CLIP)
    (part,) = [objective._noisy(examples, branches, advantages, p, 0) for p in parts(PROMPTS)]
    unscaled = Noisy(part.x, part.t, part.shift, torch.ones_like(part.scale), part.text, part.context)
    net, parameters = setup.student.net, setup.trainee.parameters
    with setup.trainee.acting("old"):
        v_old = velocity_of(objective, unscaled)
    with torch.no_grad():
        v_old = v_old + 0.1 * drawn(1, *v_old.shape).float()  # an old policy that lies elsewhere

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    singles = [
        forward_process_loss(
            velocity_of(objective, unscaled),
            v_old,
            part.x - branches.candidates[:, m],
            (advantages[:, m] / (2 * CLIP) + 0.5).repeat_interleave(2, 1),
            MIX,
        )
        for m in range(MANY)
    ]
    wanted = gradient(torch.stack(singles).mean())
    clean, old = (clean_from_velocity(part.x, v, part.t) for v in (velocity_of(objective, unscaled), v_old))
    found = gradient(branching_loss(clean, old, part.shift, unscaled.scale, MIX))
    assert net.chunk_frames == 2
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_the_student_learns_near_the_noise_that_the_followed_chunks_came_from(setup):
    setup.student.sample_as(setup.student.config.model_copy(update={"steps": (1000,)}))
    examples = setup.stream.next_batch(PROMPTS)
    branches = draw_branches(setup, examples, 0)
    nothing = torch.zeros(PROMPTS, MANY, 2)
    for spread, distance in ((1e-4, 1e-4), (0.6, math.sqrt(0.2**2 + 0.6**2)), (1.0, math.sqrt(2))):
        objective = BranchedFlowDistillation(setup, BranchConfig(noise_spread=spread))
        (part,) = [objective._noisy(examples, branches, nothing, p, 0) for p in parts(PROMPTS)]
        assert float((part.x - branches.starts).square().mean().sqrt()) == pytest.approx(distance, rel=0.1)


@pytest.mark.parametrize("chunk_by_chunk", [False, True])
@pytest.mark.parametrize("per_pass", [None, 1, 2])
def test_the_gradient_is_that_of_all_prompts_and_chunks_at_once(setup_of, chunk_by_chunk, per_pass):
    setup = branched(setup_of, learning_rate=1e-30, max_grad_norm=1e9)  # a step that no weight feels
    with torch.no_grad():
        for policy, seed in (("old", 1), ("reference", 2)):
            for weight in setup.trainee.copies[policy]:
                weight += 0.02 * drawn(seed, *weight.shape).float()
    objective = BranchedFlowDistillation(setup, BranchConfig(prior_weight=0.5))
    examples = setup.stream.next_batch(PROMPTS)
    branches = draw_branches(setup, examples, 0)
    advantages = clipped(drawn(0, PROMPTS, MANY, 2).float(), CLIP)
    found: list[Tensor] = []
    setup.trainee.optimizer.adamw.register_step_pre_hook(
        lambda *_: found.append(torch.cat([w.grad.flatten() for w in setup.trainee.optimizer.masters]))  # pyright: ignore
    )
    logs = [objective._update(examples, branches, advantages, 0, 0)]
    setup.config = setup.config.model_copy(update={"chunk_by_chunk": chunk_by_chunk, "clips_per_pass": per_pass})
    logs.append(objective._update(examples, branches, advantages, 0, 0))
    assert float((found[1] - found[0]).norm()) < 1e-6 * float(found[0].norm())
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def velocity_of(objective: BranchedFlowDistillation, part: Noisy) -> Tensor:
    (found,) = objective._velocities(objective._setup.trainee.net, part)
    return found[1]


def parts(prompts: int):
    from afd_train.objectives.parts import parts_of

    return parts_of(prompts, 1, None)
