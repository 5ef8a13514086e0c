"""What says whether a discriminator's scores mean something, and whether rollouts differ."""

import math

import pytest
import torch
from torch import Tensor

from afd_train.diagnostics import Diagnostics, preferred, rank_correlations
from afd_train.discriminators import Prompts
from afd_train.diversity import diversity
from afd_train.objective_config import AfdConfig
from afd_train.objectives import open_objective
from afd_train.objectives.judged import judge_of
from afd_train.objectives.pairing import Pairing


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 99.0], 1.0),
        ([1.0, 2.0, 3.0], [3.0, 2.0, -7.0], -1.0),
        # ranks 0 1 2 against 1 0 2: centred (-1, 0, 1) and (0, -1, 1), 1 / 2
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], 0.5),
        # ranks 0 1 2 against 0.5 0.5 2: (-1, 0, 1) and (-.5, -.5, 1), 1.5 / sqrt(2 x 1.5)
        ([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], 1.5 / math.sqrt(3)),
    ],
)
def test_rank_correlations_of_a_group_by_hand(a, b, expected):
    assert float(rank_correlations(torch.tensor([a]), torch.tensor([b]))) == pytest.approx(expected)


def test_a_group_that_does_not_differ_has_no_correlation():
    rows = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    found = rank_correlations(rows, torch.tensor([[1.0, 2.0], [5.0, 6.0]]))
    assert found.isnan().tolist() == [True, False]


def test_rank_correlations_are_those_of_scipy():
    from scipy.stats import spearmanr

    chance = torch.Generator().manual_seed(0)
    a, b = torch.randn(20, 8, generator=chance), torch.randint(4, (20, 8), generator=chance).double()
    expected = [float(spearmanr(x, y).statistic) for x, y in zip(a.numpy(), b.numpy(), strict=True)]  # pyright: ignore
    assert rank_correlations(a, b).tolist() == pytest.approx(expected)


def test_a_tie_counts_half():
    assert preferred(torch.tensor([2.0, -1.0, 1e-6, -1e-6])) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


def test_diversity_of_two_prompts_by_hand():
    # Prompt 0: takes 0, 3, 3 everywhere, distances 3, 3, 0; prompt 1: all alike.  Means 2 and 0.
    clips = torch.tensor([0.0, 3.0, 3.0, 5.0, 5.0, 5.0])[:, None, None, None, None].expand(6, 2, 3, 4, 4)
    assert diversity(clips, takes=3) == pytest.approx(1.0)


def test_diversity_scales_with_the_clips():
    clips = torch.randn(8, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert diversity(2 * clips, 4) == pytest.approx(2 * diversity(clips, 4))
    # Differences of independent unit normals have variance 2.
    assert diversity(clips, 4) == pytest.approx(math.sqrt(2), rel=0.1)


class Brightness(torch.nn.Module):
    """Scores a clip by the mean of its latents, and by `offset` more where its values are not those of 8 bits."""

    space = "latents"

    def __init__(self, sign: float = 1.0):
        super().__init__()
        self.sign = sign

    def forward(self, clips: Tensor, prompts: object, reference: object = None) -> Tensor:
        return self.sign * clips.mean((1, 2, 3, 4))[:, None]


def diagnosed(setup, net: torch.nn.Module | None = None, exact: bool = True):
    judge = judge_of(open_objective(setup))
    assert judge is not None
    if net is not None:
        judge.pairing = Pairing(setup, net)
    return Diagnostics(setup, judge, exact).run()


def test_a_discriminator_cannot_tell_a_clip_from_its_own_round_trip(setup_of):
    assert diagnosed(setup_of(AfdConfig()))["discriminator/round_trip_accuracy"] == 0.5


def test_one_that_looks_for_what_was_done_to_a_clip_is_found_out(setup_of):
    setup = setup_of(AfdConfig())
    setup.student.autoencoder.round_trip = lambda latents: latents - 0.1
    assert diagnosed(setup, Brightness())["discriminator/round_trip_accuracy"] == 1.0


def test_one_that_does_not_read_the_prompt_prefers_its_clips_in_half_of_all_pairs(setup_of):
    assert diagnosed(setup_of(AfdConfig()), Brightness())["discriminator/prompt_accuracy"] == 0.5


class Matching(torch.nn.Module):
    """Scores 1 for the clips of the given prompts, 0 for all else."""

    space = "latents"

    def __init__(self, clips: dict[str, Tensor]):
        super().__init__()
        self.clips = clips

    def forward(self, clips: Tensor, prompts: Prompts, reference: object = None) -> Tensor:
        pairs = zip(clips, prompts.texts, strict=True)
        return torch.tensor([float(torch.equal(clip, self.clips[text])) for clip, text in pairs])[:, None]


def test_one_that_does_prefers_them_in_all(setup_of):
    setup = setup_of(AfdConfig())
    first = {setup.held_out.places[key].prompt_id: key for key in reversed(setup.held_out.keys)}
    examples = [setup.held_out.example(key) for key in first.values()]
    clips = {example.prompt: clip for example, clip in zip(examples, setup.latents(examples), strict=True)}
    assert diagnosed(setup, Matching(clips), exact=False)["discriminator/prompt_accuracy"] == 1.0


def test_the_correlation_is_measured_where_the_world_is_exact_and_is_the_same_again(setup_of):
    setup = setup_of(AfdConfig(), clips_per_pass=3)
    first = diagnosed(setup)
    assert diagnosed(setup) == first
    assert diagnosed(setup, exact=False).keys() == {
        "discriminator/round_trip_accuracy",
        "discriminator/prompt_accuracy",
    }
    assert abs(first.get("discriminator/rank_correlation", 0.0)) <= 1


def test_nothing_is_measured_where_no_prompts_are_held_out(setup_of):
    setup = setup_of(AfdConfig())
    setup.held_out = None
    assert diagnosed(setup) == {}
