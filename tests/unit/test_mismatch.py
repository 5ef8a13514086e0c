"""The second comparison of a discriminator: the prompt's video against the teacher's video of another prompt."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from afd_data.errors import UserError
from afd_data.stream import Example
from afd_train.batch import check_prompts
from afd_train.objective_config import AfdConfig
from afd_train.objectives import Setup
from afd_train.objectives.judge import Judge

PROMPTS, TAKES = 4, 3


def judged(setup: Setup, **settings: Any) -> tuple[Judge, list[Example], Tensor]:
    """A discriminator with these settings, examples, and rollouts of their prompts."""
    setup.discriminator = setup.discriminator.model_copy(update=settings)
    examples = setup.stream.next_batch(PROMPTS)
    return Judge(setup), examples, setup.rollout(examples, 0, range(TAKES)).clips


CHUNKS = {"chunk_causal": True, "loss": "bt-chunk", "chunk_loss_weight": 2.0}


@pytest.mark.parametrize(("settings", "comparison"), [({}, 1), (CHUNKS, 3), ({"loss": "logistic"}, 2)])
def test_it_adds_the_same_loss_by_its_weight(setup_of, settings, comparison):
    judge, examples, rollouts = judged(setup_of(AfdConfig()), mismatch_weight=0.5, **settings)
    with torch.no_grad():  # a discriminator without an opinion: ln 2 a comparison
        for weight in judge.net.score.parameters():  # pyright: ignore
            weight.zero_()
    loss = judge.learn(examples, rollouts, 0, rate=1e-30)["discriminator/loss"]
    assert loss == pytest.approx(1.5 * comparison * math.log(2))


def test_its_clips_are_the_teachers_of_other_prompts_of_the_same_split(setup_of):
    setup = setup_of(AfdConfig())
    judge, _, _ = judged(setup, mismatch_weight=1.0, input_noise=0.0)
    seen: list[Tensor] = []
    judge.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for stream in (setup.stream, setup.held_out):
        examples = stream.next_batch(2)
        known = [stream.example(key) for key in stream.keys]
        latents = setup.latents(known)
        seen.clear()
        judge.learn(examples, setup.rollout(examples, 0, range(TAKES)).clips, 0, rate=1e-30)
        for example, clip in zip(examples, seen[0][-2:], strict=True):
            (row,) = (latents == clip).flatten(1).all(1).nonzero().flatten().tolist()
            assert known[row].prompt_id != example.prompt_id


def test_scores_are_taken_without_it(setup_of):
    setup = setup_of(AfdConfig())
    judge, examples, rollouts = judged(setup, mismatch_weight=1.0)
    calls: list[int] = []
    judge.net.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    judge.score(examples, rollouts, 0)
    assert calls == [PROMPTS * (1 + TAKES)]


def test_a_cache_of_one_prompt_has_no_other(setup_of):
    setup = setup_of(AfdConfig(), prompts_per_step=1)
    setup.discriminator = setup.discriminator.model_copy(update={"mismatch_weight": 1.0, "warmup_steps": 0})
    only = setup.stream.takes(setup.stream.places[setup.stream.keys[0]].prompt_id)
    setup.stream = SimpleNamespace(places={key: setup.stream.places[key] for key in only})
    with pytest.raises(UserError, match="mismatch_weight"):
        check_prompts(setup)


def test_only_with_it_does_a_discriminator_come_to_read_the_prompt(setup_of):
    gap = {}
    for weight in (0.0, 1.0):
        setup = setup_of(AfdConfig())
        judge, examples, rollouts = judged(setup, mismatch_weight=weight, input_noise=0.1)
        for step in range(60):
            judge.learn(examples, rollouts[::TAKES], step, rate=3e-3)
        # Whether it can learn to, not whether it has understood: on the clips that it has seen.
        clips = setup.latents(examples)
        others = torch.stack([clips.roll(shift, 0) for shift in range(1, PROMPTS)], 1).flatten(0, 1)
        teacher, other = judge.score(examples, others, 0)
        gap[weight] = float((teacher - other).mean())  # 0 where the prompt makes no difference
    assert gap[1.0] > 0.5 > 10 * abs(gap[0.0])
