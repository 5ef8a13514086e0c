"""Scores -> advantages -> weights."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from afd_train.advantages import advantages_of, clipped, discounted_future, shuffled, weights_from_advantages


def scores(seed: int = 0) -> torch.Tensor:
    """Six prompts of four rollouts; some prompts are easier than others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator) + 10 * torch.randn(6, 1, generator=generator)


def group_advantages(scores: torch.Tensor) -> torch.Tensor:
    """Of whole videos, with the settings of the paper: [P, K] -> [P, K]."""
    return advantages_of(scores[..., None]).squeeze(-1)


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


def test_adding_a_constant_to_the_discriminator_changes_nothing():
    by_chunk = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    choices: list[dict[str, Any]] = [{}, {"discount": 0.8}, {"normalisation": "prompt"}, {"baseline": "batch"}]
    for settings in choices:
        assert_close(advantages_of(by_chunk + 7, **settings), advantages_of(by_chunk, **settings))


def test_a_chunk_is_compared_with_the_same_chunk_of_other_rollouts():
    # Chunk 0 of the group: 1 and 3; chunk 1: 10 and 10.  Deviation over all four: sqrt(2 / 4).
    advantages = advantages_of(torch.tensor([[[1.0, 10.0], [3.0, 10.0]]]))
    assert_close(advantages, torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]]) * 2**0.5, rtol=1e-3, atol=0)


def test_a_batch_baseline_favours_easier_prompts():
    advantages = advantages_of(torch.tensor([[1.0, 1.0], [3.0, 3.0]])[..., None], baseline="batch")
    assert_close(advantages.squeeze(-1), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), rtol=1e-3, atol=0)


def test_normalising_by_prompt_gives_every_prompt_the_same_deviation():
    advantages = advantages_of(torch.tensor([[1.0, 3.0], [10.0, 30.0]])[..., None], normalisation="prompt")
    assert_close(advantages.squeeze(-1), torch.tensor([[-1.0, 1.0]] * 2), rtol=1e-3, atol=0)


def test_without_normalisation_an_advantage_is_a_difference_of_scores():
    advantages = advantages_of(torch.tensor([[1.0, 3.0]])[..., None], normalisation="none")
    assert advantages.flatten().tolist() == [-1.0, 1.0]


def test_the_future_is_discounted_chunk_by_chunk():
    # 4; 2 + 4 / 2; 1 + 2 / 2 + 4 / 4
    assert discounted_future(torch.tensor([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]
    assert discounted_future(torch.tensor([1.0, 2.0, 4.0]), 0.0).tolist() == [1.0, 2.0, 4.0]


def test_clipped_advantages_are_centred_again():
    # 9 becomes 3: (3 - 1 - 1 - 1) / 4 = 0 again; -3, 5 -> -3, 3.
    found = clipped(torch.tensor([[9.0, -1.0, -1.0, -1.0], [5.0, -3.0, 1.0, -1.0]]), 3.0)
    assert found.tolist() == [[3.0, -1.0, -1.0, -1.0], [3.0, -3.0, 1.0, -1.0]]
    assert_close(clipped(torch.tensor([[9.0, -1.0]]), 3.0), torch.tensor([[2.0, -2.0]]))


def test_shuffling_moves_all_chunks_of_a_rollout_together():
    advantages = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]])
    assert shuffled(advantages, torch.tensor([[0.5, 0.9, 0.1]])).tolist() == [[[3.0, 30.0], [1.0, 10.0], [2.0, 20.0]]]
