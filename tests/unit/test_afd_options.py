"""AFD's options: what a chunk is credited with, when and how often the student learns, and from whose rollouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from afd_train.discriminator_config import SpaceTimeConfig
from afd_train.draws import Draws
from afd_train.losses import forward_process_loss
from afd_train.objective_config import AfdConfig, BranchConfig
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.afd import AdversarialFlowDistillation
from afd_train.objectives.branch import BranchedFlowDistillation
from afd_train.objectives.forward_process import ForwardProcess, Step
from afd_train.objectives.parts import parts_of

PROMPTS, TAKES = 3, 4


def times_of(setup: Setup, config: AfdConfig) -> torch.Tensor:
    where = torch.rand(2_000, 1, generator=torch.Generator().manual_seed(0))
    return ForwardProcess(setup, config)._times(where, 4)[:, 0]


def test_times_are_the_samplers_own_by_default(setup_of):
    setup = setup_of(AfdConfig(), student={"steps": (1000, 500), "first_chunk_steps": (1000,)})
    t = times_of(setup, AfdConfig())
    assert set(t[:, :2].unique().tolist()) == {1.0}
    assert t[:, 2:].unique().tolist() == pytest.approx([5 * 0.5 / 3, 1.0])


def test_times_of_a_range_fill_it_evenly(setup_of):
    t = times_of(setup_of(AfdConfig()), AfdConfig(times="range", time_range=(0.6, 1.0)))
    assert 0.6 <= float(t.min()) < 0.605
    assert 0.995 < float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.8, abs=0.01)
    assert torch.equal(t, t[:, :1].expand(-1, 4))  # one time for a clip


def test_uniform_times_reach_from_almost_clean_to_noise(setup_of):
    t = times_of(setup_of(AfdConfig()), AfdConfig(times="uniform"))
    assert 0.02 <= float(t.min()) < 0.03
    assert float(t.max()) > 0.995


def test_a_chunk_without_opinion_gets_no_gradient():
    v_old, target = torch.zeros(1, 4, 1, 1, 1), torch.ones(1, 4, 1, 1, 1)
    v = v_old.clone().requires_grad_()
    forward_process_loss(v, v_old, target, torch.tensor([[0.5, 0.5, 1.0, 0.0]]), policy_mix=0.1).backward()
    # 2 mix (2 w - 1) (v_old - target) / 4
    assert v.grad is not None
    assert v.grad.flatten().tolist() == pytest.approx([0, 0, -0.05, 0.05])


def test_the_adaptive_weight_divides_each_branch_by_its_own_distance():
    v_old, v, target = (torch.full((1, 1, 1, 1, 2), value) for value in (0.0, 1.0, 2.0))
    # mix 1: v+ = 1 and v- = -1 lie 1 and 3 from the target; 1^2 / 1 and 3^2 / 3.
    loss = forward_process_loss(v, v_old, target, torch.tensor([[0.75]]), policy_mix=1.0, adaptive=True)
    assert float(loss) == pytest.approx(0.75 * 1 + 0.25 * 3)


def test_inner_updates_are_steps_of_their_own_on_one_rollout(setup_of):
    setup = setup_of(AfdConfig(), learning_rate=1e-3)
    drawn = Step.drawn(setup, setup.stream.next_batch(PROMPTS), 0)
    seen: list[torch.Tensor] = []
    process = ForwardProcess(setup, AfdConfig(inner_updates=3))
    noisy = process._noisy
    process._noisy = lambda *arguments: seen.append((found := noisy(*arguments)).x) or found  # pyright: ignore[reportAttributeAccessIssue]
    process.update(drawn, torch.full((PROMPTS * TAKES, 1), 0.9))
    assert int(setup.trainee.optimizer.adamw.state_dict()["state"][0]["step"]) == 3
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])


def test_branches_are_learnt_from_as_often_with_other_noise(setup_of):
    config = BranchConfig(inner_updates=3)
    setup = setup_of(config, learning_rate=1e-3)
    setup.discriminator = SpaceTimeConfig(dim=16, heads=2, layers=1, chunk_causal=True, warmup_steps=0)
    objective, seen = BranchedFlowDistillation(setup, config), []
    noisy = objective._noisy
    objective._noisy = lambda *arguments: seen.append((found := noisy(*arguments)).x) or found  # pyright: ignore[reportAttributeAccessIssue]
    objective.step(setup.stream.next_batch(PROMPTS), 0)
    assert int(setup.trainee.optimizer.adamw.state_dict()["state"][0]["step"]) == 3
    assert len({float(x.sum()) for x in seen}) == 3


@pytest.mark.parametrize(("spread", "distance"), [(1e-4, 1e-4), (0.6, (0.2**2 + 0.6**2) ** 0.5), (1.0, 2**0.5)])
def test_at_noise_alone_a_clip_meets_noise_near_what_it_was_drawn_from(setup_of, spread, distance):
    config = AfdConfig(noise_spread=spread, noisings_per_clip=2)
    setup = setup_of(config, student={"steps": (1000, 500)})
    drawn = Step.drawn(setup, setup.stream.next_batch(PROMPTS), 0)
    (part,) = parts_of(PROMPTS, TAKES, None)
    noisy = ForwardProcess(setup, config)._noisy(drawn, part, 0)
    apart = (noisy.target + drawn.clips.repeat(1, 2, 1, 1, 1) - drawn.starts.repeat(1, 2, 1, 1, 1)).square()
    apart = apart.mean((2, 3, 4)).sqrt()  # of each frame; the target is noise - clip
    assert float(apart[noisy.t == 1].mean()) == pytest.approx(distance, rel=0.1)
    assert float(apart[noisy.t < 1].mean()) == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.parametrize("credit", ["chunk", "future"])
def test_chunks_are_credited_by_scores_of_their_own(setup_of, credit):
    setup = setup_of(AfdConfig(credit=credit))
    setup.discriminator = SpaceTimeConfig(dim=16, heads=2, layers=1, chunk_causal=True, warmup_prompts=4)
    objective = AdversarialFlowDistillation(setup, AfdConfig(credit=credit, discount=0.5, normalisation="none"))
    scores = torch.tensor([[[0.0, 0.0], [2.0, 4.0]]])
    # Centred: -1, 1 and -2, 2; the first chunk also gets half of the second.
    wanted = {"chunk": [[-1.0, -2.0], [1.0, 2.0]], "future": [[-2.0, -2.0], [2.0, 2.0]]}[credit]
    assert objective._advantages(setup.stream.next_batch(1), scores, 0)[0].tolist() == wanted
    metrics = objective.step(setup.stream.next_batch(PROMPTS), 0)
    assert metrics["student/grad_norm"] > 0


def test_off_policy_rollouts_are_those_of_the_student_some_steps_ago(setup_of):
    setup = setup_of(AfdConfig(off_policy_steps=2), learning_rate=3e-2)
    objective = open_objective(setup)
    assert isinstance(objective, AdversarialFlowDistillation)
    examples = setup.stream.next_batch(PROMPTS)
    before = setup.rollout(examples, 1, range(TAKES)).clips
    objective.step(examples, 0)
    assert_close(objective._drawn(examples, 1).clips, before, rtol=0, atol=1e-6)
    current = setup.rollout(examples, 2, range(TAKES)).clips
    assert_close(objective._drawn(examples, 2).clips, current, rtol=0, atol=1e-6)
    assert not torch.allclose(setup.rollout(examples, 1, range(TAKES)).clips, before, atol=1e-4)


@pytest.mark.parametrize("config", [AfdConfig, BranchConfig])
def test_every_inner_update_has_an_anchor_with_noise_of_its_own(setup_of, config, monkeypatch):
    setup = setup_of(config(sft_weight=0.5, inner_updates=3))
    setup.discriminator = SpaceTimeConfig(dim=16, heads=2, layers=1, chunk_causal=True)
    purposes: list[str] = []
    draws = Setup.draws

    def noted(self: Setup, step: int, purpose: str, *clips: Any) -> Draws:
        purposes.append(purpose)
        return draws(self, step, purpose, *clips)

    monkeypatch.setattr(Setup, "draws", noted)
    open_objective(setup).step(setup.stream.next_batch(PROMPTS), 0)
    updates = [purpose for purpose in purposes if purpose.startswith(("anchor", "forward process"))]
    assert updates == [
        "anchor", "forward process", "anchor 1", "forward process 1", "anchor 2", "forward process 2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["afd", "afd-branch"])
def test_supervised_steps_come_before_the_first_and_an_anchor_beside_every_one(setup_of, name):
    config = {"afd": AfdConfig, "afd-branch": BranchConfig}[name](sft_steps=2, sft_weight=0.5)
    setup = setup_of(config, prompts_per_step=PROMPTS)
    setup.discriminator = SpaceTimeConfig(
        dim=16, heads=2, layers=1, chunk_causal=True, warmup_steps=1, warmup_prompts=4
    )
    objective, rows = open_objective(setup), []
    objective.prepare(lambda step, metrics: rows.append((step, sorted(metrics)[0].partition("/")[0])))
    assert rows == [(-3, "student"), (-2, "student"), (-1, "discriminator")]
    for old, student in zip(setup.trainee.copies["old"], setup.trainee.optimizer.masters, strict=True):
        assert torch.equal(old, student.detach())
    assert objective.step(setup.stream.next_batch(PROMPTS), 0)["student/anchor_loss"] > 0
