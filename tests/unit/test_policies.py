"""Averages, schedules and the one optimiser step."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing import assert_close

from afd_train.config import FlowMatchingConfig, TrainConfig
from afd_train.policies import Trainee, descend, ema_update, frozen_copy, learning_rate_factor


def config(**settings) -> TrainConfig:
    return TrainConfig(objective=FlowMatchingConfig(), **settings)


def line(*weights: float) -> nn.Linear:
    """A linear map with these weights and no bias."""
    net = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([weights]))
    return net


def test_the_average_moves_by_one_minus_decay():
    average = line(1.0, -1.0)
    ema_update(average, line(3.0, 1.0), decay=0.75)
    assert average.weight.tolist() == [[1.5, -0.5]]  # 0.75 x 1 + 0.25 x 3, 0.75 x -1 + 0.25 x 1


def test_decay_0_copies_the_network():
    average = line(1.0)
    ema_update(average, line(3.0), decay=0.0)
    assert average.weight.tolist() == [[3.0]]


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


def test_descend_clips_the_gradient_and_reports_its_norm_before():
    net = line(0.0, 0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    loss = net(torch.tensor([[30.0, 40.0]])).sum()
    assert descend(Accelerator(), optimizer, loss, max_grad_norm=1.0) == pytest.approx(50)
    assert_close(net.weight.detach(), torch.tensor([[-0.6, -0.8]]), rtol=1e-4, atol=0)


def test_descend_forgets_the_gradient_of_the_step_before():
    net = line(0.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    norms = [descend(Accelerator(), optimizer, net(torch.tensor([[2.0]])).sum(), max_grad_norm=10.0) for _ in "ab"]
    assert norms == [2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(bad):
    net = line(1.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
    assert not math.isfinite(descend(Accelerator(), optimizer, net(torch.tensor([[bad]])).sum(), max_grad_norm=1.0))
    assert net.weight.tolist() == [[1.0]]
    assert not optimizer.state


def test_an_update_moves_by_the_scheduled_rate_and_the_average_follows(tiny_student):
    net = tiny_student().net
    settings = config(steps=10, warmup_steps=1, learning_rate=1e-3, weight_decay=0.0, evaluation_ema=0.9)
    trainee = Trainee(net, settings, Accelerator())
    weight = net.transformer.patch_embedding.bias
    assert weight is not None
    before = weight.detach().clone()
    trainee.update(weight.sum(), step=0)
    # Adam's first step is the learning rate, half of 1e-3 in the first of two warm-up steps.
    assert_close(weight.detach(), before - 5e-4, rtol=0, atol=1e-7)
    average = trainee.evaluation.transformer.patch_embedding.bias
    assert average is not None
    assert_close(average, before - 5e-5, rtol=0, atol=1e-7)
    assert not average.requires_grad
