"""Supervised fine-tuning, and what other objectives take of it: gradients against losses written out in full."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from afd_train.flow import noised
from afd_train.objective_config import AfdConfig, FlowMatchingConfig, SftConfig
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.flow_matching import accumulate_teacher_forced, chunk_times, warm_start

PROMPTS = 3
STILL = {"learning_rate": 1e-30, "max_grad_norm": 1e9}  # a step that no weight feels


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def student_of(setup: Setup) -> Tensor:
    return flat(setup.trainee.parameters)


def gradient_of(setup: Setup) -> Tensor:
    """What was accumulated so far."""
    return flat(weight.grad for weight in setup.trainee.parameters if weight.grad is not None)


def kept_gradients(setup: Setup) -> list[Tensor]:
    found: list[Tensor] = []
    setup.trainee.optimizer.adamw.register_step_pre_hook(lambda *_: found.append(gradient_of(setup)))
    return found


def shifted(setup: Setup) -> Setup:
    """The student in another place than the reference that it started from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in setup.trainee.parameters:
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return setup


def test_without_a_prior_it_is_flow_matching(setup_of):
    found = []
    for objective in (FlowMatchingConfig(), SftConfig()):
        setup = setup_of(objective)
        metrics = open_objective(setup).step(setup.stream.next_batch(PROMPTS), step=3)
        found.append((metrics, student_of(setup)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_gradient_is_that_of_flow_matching_plus_the_squared_distance_to_the_reference(setup_of):
    weight, step = 0.7, 3
    setup = setup_of(SftConfig(prior_weight=weight), student={"prediction": "velocity"}, **STILL)
    net, examples = setup.trainee.net, setup.stream.next_batch(PROMPTS)
    clips, text = setup.latents(examples), setup.text(examples)
    draws = setup.draws(step, "flow matching", examples)
    t, noise = chunk_times(clips.shape[1], net.chunk_frames, draws), draws.normal(*clips.shape[1:])
    with torch.no_grad():
        of_reference = net(noised(clips, noise, t), t, text, clean=clips)
    shifted(setup)
    v = net(noised(clips, noise, t), t, text, clean=clips)
    loss, distance = (v - (noise - clips)).square().mean(), (v - of_reference).square().mean()
    expected = flat(torch.autograd.grad(loss + weight * distance, setup.trainee.parameters))
    gradients = kept_gradients(setup)
    metrics = open_objective(setup).step(examples, step)
    assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6 * float(expected.norm()))
    assert metrics["student/loss"] == pytest.approx(loss.item(), rel=1e-5)
    share = float(distance.detach() / of_reference.square().mean())
    assert metrics["student/reference_distance"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("per_pass", [1, 2])
def test_parts_take_the_same_step(setup_of, per_pass):
    found = []
    for clips_per_pass in (None, per_pass):
        setup = shifted(setup_of(SftConfig(prior_weight=0.5), clips_per_pass=clips_per_pass, **STILL))
        gradients = kept_gradients(setup)
        metrics = open_objective(setup).step(setup.stream.next_batch(PROMPTS), step=0)
        found.append((gradients[0], metrics))
    (whole, expected), (parts, metrics) = found
    assert float((parts - whole).norm()) < 1e-6 * float(whole.norm())
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_the_teachers_videos_are_learnt_and_the_reference_stays(setup_of):
    setup = setup_of(SftConfig(prior_weight=1e-3), learning_rate=3e-3)
    start = student_of(setup)
    objective = open_objective(setup)
    losses = [objective.step(setup.stream.next_batch(PROMPTS), step)["student/loss"] for step in range(12)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert torch.equal(flat(setup.trainee.copies["reference"]), start)


def test_a_strong_prior_holds_the_student_at_the_reference(setup_of):
    moved = []
    for weight in (0.0, 1e4):
        setup = setup_of(SftConfig(prior_weight=weight), learning_rate=1e-3, warmup_steps=0)
        start, objective = student_of(setup), open_objective(setup)
        for step in range(10):
            objective.step(setup.stream.next_batch(PROMPTS), step)
        moved.append(float((student_of(setup) - start).norm()))
    assert moved[1] < 0.5 * moved[0]


def test_an_anchor_adds_its_share_of_the_gradient_and_makes_no_update(setup_of):
    setup = setup_of(AfdConfig())
    examples, start = setup.stream.next_batch(PROMPTS), student_of(setup)
    loss = accumulate_teacher_forced(setup, examples, step=5, purpose="anchor")
    whole = gradient_of(setup)
    assert accumulate_teacher_forced(setup, examples, step=5, purpose="anchor", scale=0.25) == loss
    assert_close(gradient_of(setup), 1.25 * whole)
    assert torch.equal(student_of(setup), start)
    assert accumulate_teacher_forced(setup, examples, step=5) != loss  # other noise for another purpose


def test_a_warm_start_comes_before_the_discriminators_and_the_old_policy_begins_where_it_ends(setup_of):
    setup = setup_of(AfdConfig(), learning_rate=1e-3)
    setup = replace(setup, discriminator=setup.discriminator.model_copy(update={"warmup_steps": 5}))
    start, rows = student_of(setup), []
    warm_start(setup, 3, lambda step, metrics: rows.append((step, metrics)))
    assert [step for step, _ in rows] == [-8, -7, -6]
    assert all(metrics.keys() == {"student/loss", "student/grad_norm"} for _, metrics in rows)
    assert not torch.equal(student_of(setup), start)
    assert torch.equal(flat(setup.trainee.copies["old"]), student_of(setup))
    assert torch.equal(flat(setup.trainee.copies["reference"]), start)


def test_no_warm_start_changes_nothing(setup_of):
    setup = setup_of(AfdConfig())
    start, drawn = student_of(setup), setup.stream.state_dict()
    warm_start(setup, 0, lambda *_: pytest.fail("nothing to log"))
    assert torch.equal(student_of(setup), start)
    assert setup.stream.state_dict() == drawn
