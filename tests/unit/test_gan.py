"""Adversarial training: the student's gradient against a loss written out in full, in parts and at once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from afd_data.stream import Example
from afd_train.discriminators import Prompts
from afd_train.objective_config import GanConfig, policies_of
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.gan import Adversarial
from afd_train.objectives.judge import Judge
from afd_train.students.causal_wan import CausalWan

PROMPTS, TAKES, STEP = 3, 4, 2
STILL: dict[str, Any] = {"learning_rate": 1e-30, "max_grad_norm": 1e9}  # a step that no weight feels
CHUNKS: dict[str, Any] = {"chunk_causal": True, "loss": "bt-chunk"}
LOSSES: list[dict[str, Any]] = [{"loss": "bt"}, {"loss": "logistic"}, CHUNKS, {"view": "luminance"}]


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def judged_by(setup: Setup, **settings: Any) -> Setup:
    """The setup with other settings of the discriminator."""
    return replace(setup, discriminator=type(setup.discriminator)(**(dict(setup.discriminator) | settings)))


def opened(setup: Setup) -> Adversarial:
    objective = open_objective(setup)
    assert isinstance(objective, Adversarial)
    return objective


def gradient_of_step(setup: Setup, examples: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
    """What the student's optimiser is given in a step, all weights in a row, and the step's log."""
    found: list[Tensor] = []
    hook = setup.trainee.optimizer.adamw.register_step_pre_hook(
        lambda *_: found.append(flat(weight.grad for weight in setup.trainee.parameters))
    )
    metrics = opened(setup).step(examples, STEP)
    hook.remove()
    return found[0], metrics


def shifted(setup: Setup) -> Setup:
    """The student in another place than its reference, where every weight matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in setup.trainee.parameters:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return setup


def student_loss(setup: Setup, judge: Judge, teacher: Tensor, student: Tensor, text: Tensor) -> Tensor:
    """Written out: every clip is scored on its own, every rollout compared with its prompt's video."""

    def score(clips: Tensor, embeddings: Tensor) -> Tensor:
        return judge.net(clips, Prompts([""] * len(clips), embeddings), None)

    of_teacher, of_student = score(teacher, text), score(student, text.repeat_interleave(TAKES, 0))
    gap = of_teacher.repeat_interleave(TAKES, 0) - of_student
    if setup.discriminator.loss == "logistic":
        return F.softplus(-of_student.mean(1)).mean()
    loss = F.softplus(gap.mean(1)).mean()
    if setup.discriminator.loss == "bt-chunk":
        loss = loss + setup.discriminator.chunk_loss_weight * F.softplus(gap).mean()
    return loss


def test_a_step_moves_student_and_discriminator_and_leaves_the_reference(setup_of):
    setup = setup_of(GanConfig(), learning_rate=1e-3)
    objective = opened(setup)
    start, judge = flat(setup.trainee.parameters), flat(objective.modules["discriminator"].parameters())
    objective.step(setup.stream.next_batch(PROMPTS), step=0)
    assert not torch.equal(flat(setup.trainee.parameters), start)
    assert not torch.equal(flat(objective.modules["discriminator"].parameters()), judge)
    assert torch.equal(flat(setup.trainee.copies["reference"]), start)


def test_it_logs_what_the_discriminator_and_the_student_do(setup_of):
    setup = setup_of(GanConfig())
    metrics = opened(setup).step(setup.stream.next_batch(PROMPTS), step=0)
    which = [f"{kind}{what}" for kind in ("", "clean_", "held_out_") for what in ("accuracy", "margin")]
    of_discriminator = {
        f"discriminator/{name}" for name in (*which, "loss", "held_out_loss", "grad_norm", "learning_rate")
    }
    assert metrics.keys() == of_discriminator | {
        f"student/{n}" for n in ("loss", "grad_norm", "reference_distance", "diversity")
    }
    assert {"seconds/rollout", "seconds/discriminator", "seconds/update"} <= setup.watch.read().keys()
    assert len(setup.margins.rows()) == PROMPTS


def test_without_a_prior_no_reference_is_kept(setup_of):
    assert policies_of(GanConfig(prior_weight=0.0)) == ()
    setup = setup_of(GanConfig(prior_weight=0.0))
    metrics = opened(setup).step(setup.stream.next_batch(PROMPTS), step=0)
    assert "student/reference_distance" not in metrics


@pytest.mark.parametrize("judging", LOSSES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_pull_on_clips_is_the_gradient_of_the_loss_at_8_bit_video(setup_of, judging):
    setup = judged_by(setup_of(GanConfig()), **judging)
    judge, examples = Judge(setup), setup.stream.next_batch(PROMPTS)
    clips = setup.rollout(examples, STEP, range(TAKES)).clips
    rounded = setup.student.autoencoder.round_trip(clips).requires_grad_()
    loss = student_loss(setup, judge, setup.latents(examples), rounded, setup.text(examples))
    pull = judge.pull(examples, clips, STEP)
    assert pull.loss == pytest.approx(loss.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(loss, rounded)
    assert_close(pull.gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert all(weight.grad is None for weight in judge.net.parameters())
    assert not clips.requires_grad


@pytest.mark.parametrize(("steps", "last"), [((1000,), 1.0), ((1000, 500), 5 / 6)])  # 500 warped by 5: 2.5 / 3
def test_the_gradient_reaches_the_student_through_the_last_step_of_every_chunk_only(setup_of, steps, last):
    weight = 0.5
    setup = setup_of(GanConfig(prior_weight=weight), student={"steps": steps, "prediction": "velocity"}, **STILL)
    setup = shifted(judged_by(setup, learning_rate=0.0))
    judge, examples = Judge(setup), setup.stream.next_batch(PROMPTS)
    text, rollouts = setup.text(examples), setup.rollout(examples, STEP, range(TAKES))
    # What the network saw at its last step, beside the keys and values, without gradient, of the same rollout.
    noisy = torch.cat([visited[-1] for visited in rollouts.visited], 1)

    def velocity(net: CausalWan) -> Tensor:
        cache = net.remember(rollouts.context, text, net.memory(rollouts.context.shape[1]))
        return net.chunks(noisy, torch.full(noisy.shape[:2], last), text, cache)

    with setup.trainee.acting("reference") as net:
        of_reference = velocity(net)
    v = velocity(setup.trainee.net)
    clean, distance = noisy - last * v, (v - of_reference).square().mean()
    assert_close(clean, rollouts.clips, rtol=1e-4, atol=1e-4)
    as_judged = clean + (setup.student.autoencoder.round_trip(rollouts.clips) - clean).detach()
    loss = student_loss(setup, judge, setup.latents(examples), as_judged, text)
    expected = flat(torch.autograd.grad(loss + weight * distance, setup.trainee.parameters))
    gradient, metrics = gradient_of_step(setup, examples)
    assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm())
    assert metrics["student/loss"] == pytest.approx(loss.item(), rel=1e-4)
    share = float(distance.detach() / of_reference.square().mean())
    assert metrics["student/reference_distance"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("settings", [{"clips_per_pass": n} for n in (1, 3, 8)] + [{"chunk_by_chunk": True}], ids=str)
def test_parts_and_chunks_take_the_same_step(setup_of, settings):
    found = []
    for own in ({}, settings):
        setup = setup_of(GanConfig(prior_weight=0.5), student={"steps": (1000, 500)}, **(STILL | own))
        setup = shifted(judged_by(setup, learning_rate=0.0))
        found.append(gradient_of_step(setup, setup.stream.next_batch(PROMPTS)))
    (whole, expected), (parts, metrics) = found
    # Not closer, because a pixel may be rounded to the next of its 256 values.
    assert float((parts - whole).norm()) < 1e-2 * float(whole.norm())
    assert metrics == pytest.approx(expected, rel=1e-2)


def test_against_a_discriminator_that_rests_the_loss_falls(setup_of):
    setup = judged_by(setup_of(GanConfig(prior_weight=0.0), learning_rate=1e-3, warmup_steps=0), learning_rate=0.0)
    objective, examples = opened(setup), setup.stream.next_batch(PROMPTS)
    losses = [objective.step(examples, step)["student/loss"] for step in range(12)]
    assert sum(losses[-4:]) < sum(losses[:4]) - 4 * 1e-3


def test_the_warm_up_moves_the_discriminator_only(setup_of):
    setup = setup_of(GanConfig())
    objective, rows = opened(setup), []
    start, judge = flat(setup.trainee.parameters), flat(objective.modules["discriminator"].parameters())
    objective.prepare(lambda step, metrics: rows.append(step))
    assert rows == [-2, -1]
    assert torch.equal(flat(setup.trainee.parameters), start)
    assert not torch.equal(flat(objective.modules["discriminator"].parameters()), judge)
