"""Scores -> advantages -> weights."""

import pytest
import torch
from torch.testing import assert_close

from afd_train.advantages import group_advantages, shuffled, weights_from_advantages


def scores(seed: int = 0) -> torch.Tensor:
    """Six prompts of four rollouts; some prompts are easier than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator) + 10 * torch.randn(6, 1, generator=generator)


def draws(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_baseline_is_the_mean_of_the_prompts_own_group():
    # Groups (1, 3) and (10, 10): centred -1, 1, 0, 0; standard deviation over all of them sqrt(2 / 4).
    advantages = group_advantages(torch.tensor([[1.0, 3.0], [10.0, 10.0]]))
    assert_close(advantages, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) * 2**0.5, rtol=1e-3, atol=0)


def test_every_group_sums_to_zero():
    assert_close(group_advantages(scores()).sum(1), torch.zeros(6), rtol=0, atol=1e-5)


def test_advantages_have_unit_deviation_over_all_groups():
    assert float(group_advantages(scores()).square().mean()) == pytest.approx(1, rel=1e-3)


def test_an_easier_prompt_gets_no_better_advantages():
    easier = scores()
    easier[0] += 100
    assert_close(group_advantages(easier), group_advantages(scores()), rtol=1e-3, atol=1e-4)


def test_equal_scores_give_no_advantage_and_no_nan():
    assert torch.equal(group_advantages(torch.full((3, 4), 2.5)), torch.zeros(3, 4))


def test_no_advantage_is_weight_one_half():
    assert float(weights_from_advantages(torch.tensor(0.0), clip=5.0)) == 0.5


def test_weights_rise_linearly_and_are_clipped_to_0_and_1():
    weights = weights_from_advantages(torch.tensor([-9.0, -5.0, -2.5, 2.5, 5.0, 9.0]), clip=5.0)
    assert weights.tolist() == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]


def test_weights_average_one_half_for_every_prompt():
    advantages = group_advantages(scores())
    assert advantages.abs().max() < 5  # nothing is clipped
    assert_close(weights_from_advantages(advantages, clip=5.0).mean(1), torch.full((6,), 0.5))


def test_shuffling_keeps_every_groups_values():
    advantages = group_advantages(scores())
    moved = shuffled(advantages, draws(3, *advantages.shape))
    assert not torch.equal(moved, advantages)
    assert torch.equal(moved.sort(1).values, advantages.sort(1).values)


def test_shuffling_breaks_the_tie_between_rollout_and_advantage():
    # A uniformly drawn permutation of a row that sums to 0 has no correlation with the row, on average.
    advantages = group_advantages(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)))
    moved = shuffled(advantages, draws(1, *advantages.shape))
    assert abs(float((moved * advantages).mean())) < 0.02


def test_the_draws_order_is_the_new_order():
    moved = shuffled(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.9, 0.1]]))
    assert moved.tolist() == [[3.0, 1.0, 2.0]]
