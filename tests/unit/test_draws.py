"""What a clip draws follows from (seed, step, purpose, clip), and from nothing else."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from afd_train.draws import Draws, generator
from afd_train.objective_config import FlowMatchingConfig

CPU = torch.device("cpu")


def draws_of(clips: Sequence[str], seed: int = 0, step: int = 3, purpose: str = "noise") -> Draws:
    return Draws(seed, step, purpose, clips, CPU)


def everything(draws: Draws) -> list[Tensor]:
    """One draw of each kind, one after the other."""
    return [draws.normal(2, 3), draws.uniform(4), draws.uniform(), draws.integers(1000, 5)]


def test_a_clip_draws_the_same_whichever_clips_are_beside_it():
    alone = everything(draws_of(["b/0"]))
    for clips in (["a/0", "b/0"], ["b/0", "a/0"], ["c/0", "b/0", "b/1"]):
        together = everything(draws_of(clips))
        assert all(torch.equal(row[clips.index("b/0")], one[0]) for row, one in zip(together, alone, strict=True))


def test_a_processs_share_of_the_clips_draws_what_all_of_them_draw():
    clips = [f"{key}/{take}" for key in "abc" for take in range(2)]
    whole = everything(draws_of(clips))
    for rank in range(2):
        own = everything(draws_of(clips[rank::2]))
        assert all(torch.equal(part, row[rank::2]) for part, row in zip(own, whole, strict=True))


def test_another_seed_step_purpose_key_or_take_draws_others():
    base = {"clips": ["a/0"], "seed": 0, "step": 3, "purpose": "noise"}
    others = [{"seed": 1}, {"step": 4}, {"purpose": "time"}, {"clips": ["b/0"]}, {"clips": ["a/1"]}]
    found = [float(draws_of(**(base | other)).uniform()) for other in ({}, *others)]
    assert len(set(found)) == 6
    assert float(draws_of(**base).uniform()) == found[0]


def test_a_second_draw_is_another_one():
    draws = draws_of(["a/0", "b/0"])
    assert not torch.equal(draws.normal(3), draws.normal(3))
    again = draws_of(["a/0", "b/0"])
    again.normal(3)
    assert not torch.equal(again.normal(3), draws_of(["a/0", "b/0"]).normal(3))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), everything(draws_of(["a/0"]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(everything(draws_of(["a/0"])), first, strict=True))


def test_draws_have_the_moments_and_the_range_that_they_promise():
    draws = draws_of([f"{number}/0" for number in range(2000)])
    normal, uniform, integers = draws.normal(5), draws.uniform(5), draws.integers(4, 5)
    assert normal.shape == uniform.shape == integers.shape == (2000, 5)
    assert float(normal.mean()) == pytest.approx(0, abs=0.04)  # 10,000 numbers: 0.01
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.012)  # 0.003
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert [float((integers == value).float().mean()) for value in range(4)] == pytest.approx([0.25] * 4, abs=0.02)


def test_a_generator_follows_from_the_text_of_what_it_is_for():
    def draw(*what: object) -> float:
        return float(torch.rand((), generator=generator(*what)))

    assert draw(0, 1, "exit") == draw("0", "1", "exit")
    assert len({draw(seed, step, what) for seed in (0, 1) for step in (0, 1) for what in ("exit", "noise")}) == 8


def test_a_setups_draws_are_those_of_its_seed_and_of_every_take_of_a_prompt(setup_of):
    setup = setup_of(FlowMatchingConfig(), seed=4)
    examples = setup.stream.next_batch(2)
    clips = [f"{example.key}/{take}" for example in examples for take in (1, 2)]
    found = setup.draws(7, "noise", examples, range(1, 3)).normal(3)
    assert torch.equal(found, Draws(4, 7, "noise", clips, CPU).normal(3))
    assert torch.equal(
        setup.draws(7, "noise", examples).normal(3), setup.draws(7, "noise", examples, range(1)).normal(3)
    )
    shared = torch.rand((), generator=setup.shared(7, "exit"))
    assert shared == torch.rand((), generator=generator(4, 7, "exit"))
