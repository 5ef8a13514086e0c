"""Control of the discriminator's learning rate by its margin."""

import itertools
import json
import random

import pytest

from afd_train.discriminator_config import MarginBand
from afd_train.objectives.band import MarginController

BAND = MarginBand(low=1.0, high=2.0, memory=0.0, gain=1.5, smallest=0.2, largest=3.0)


def factors(config: MarginBand | None, margins: list[float]) -> list[float]:
    controller, found = MarginController(config), []
    for margin in margins:
        controller.update(margin)
        found.append(controller.factor)
    return found


def test_above_the_band_it_learns_slower_below_it_faster_and_inside_as_before():
    assert factors(BAND, [2.5, 1.5, 0.5, 0.5]) == pytest.approx([1 / 1.5, 1 / 1.5, 1.0, 1.5])


def test_at_its_borders_nothing_changes():
    assert factors(BAND, [1.0, 2.0]) == [1.0, 1.0]


def test_the_mean_is_what_is_compared():
    # 0.5 x 1.5 + 0.5 x 3 = 2.25 is above the band, 0.5 x 2.25 + 0.5 x 1.5 = 1.875 is not.
    config = BAND.model_copy(update={"memory": 0.5})
    assert factors(config, [1.5, 3.0, 1.5]) == pytest.approx([1.0, 1 / 1.5, 1 / 1.5])


def test_without_a_band_the_rate_stays():
    assert factors(None, [100.0, -100.0]) == [1.0, 1.0]


def test_it_stays_inside_its_limits_whatever_comes():
    chance = random.Random(0)
    for _ in range(50):
        found = factors(BAND, [chance.gauss(1.5, 10.0) for _ in range(40)])
        assert all(BAND.smallest <= factor <= BAND.largest for factor in found)
    assert factors(BAND, [9.0] * 9)[-1] == BAND.smallest
    assert factors(BAND, [-9.0] * 9)[-1] == BAND.largest


def test_a_larger_margin_never_makes_it_learn_faster():
    chance = random.Random(1)
    for _ in range(50):
        history = [chance.uniform(-1, 4) for _ in range(10)]
        last = [factors(BAND, [*history, margin])[-1] for margin in (-5.0, 0.5, 1.0, 1.5, 2.0, 2.5, 9.0)]
        assert all(one >= other for one, other in itertools.pairwise(last))


@pytest.mark.parametrize(("strength", "uncontrolled"), [(0.1, 0.5), (0.6, 3.0), (1.2, 6.0)])
def test_a_plant_whose_margin_grows_with_the_rate_is_held_in_the_band(strength, uncontrolled):
    """Margin <- 0.8 margin + strength x rate, which without control settles at 5 strength."""
    config = MarginBand(low=1.0, high=2.0, memory=0.5, gain=1.05, smallest=0.1, largest=8.0)
    chance = random.Random(2)

    def settled(config: MarginBand | None) -> list[float]:
        controller, margin, found = MarginController(config), 0.0, []
        for _ in range(300):
            margin = 0.8 * margin + strength * controller.factor
            controller.update(margin + chance.gauss(0, 0.1))
            found.append(margin)
        return found[150:]

    assert settled(None)[-1] == pytest.approx(uncontrolled)
    assert all(0.8 < margin < 2.3 for margin in settled(config))


def test_a_resumed_controller_goes_on_bit_for_bit():
    margins = [3.0, 0.1, 5.0, 1.3, 0.7]
    config = BAND.model_copy(update={"memory": 0.9})
    unbroken, broken = MarginController(config), MarginController(config)
    for margin in margins[:3]:
        unbroken.update(margin)
        broken.update(margin)
    resumed = MarginController(config)
    resumed.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    for margin in margins[3:]:
        unbroken.update(margin)
        resumed.update(margin)
    assert resumed.state_dict() == unbroken.state_dict()
