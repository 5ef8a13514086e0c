"""The flow convention: t = 0 is clean, t = 1 is noise, velocity points from clean to noise."""

import pytest
import torch
from torch.testing import assert_close

from afd_train.flow import (
    clean_from_velocity,
    nearest_time,
    noised,
    schedule,
    table,
    velocity,
    velocity_from_clean,
    warped,
)

SHAPE = (2, 3, 4, 5, 5)


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_time_0_is_the_clean_clip_and_time_1_is_noise(clean, noise):
    assert torch.equal(noised(clean, noise, torch.zeros(2, 3)), clean)
    assert torch.equal(noised(clean, noise, torch.ones(2, 3)), noise)


def test_every_frame_has_a_time_of_its_own():
    t = torch.tensor([[0.0, 0.25, 1.0]])
    x = noised(torch.full((1, 3, 1, 1, 1), 4.0), torch.full((1, 3, 1, 1, 1), 8.0), t)
    assert x.flatten().tolist() == [4.0, 5.0, 8.0]  # 0.75 x 4 + 0.25 x 8 = 5


def test_velocity_is_the_derivative_of_the_noised_clip(clean, noise):
    later, earlier = torch.full((2, 3), 0.75), torch.full((2, 3), 0.25)
    slope = (noised(clean, noise, later) - noised(clean, noise, earlier)) / 0.5
    assert_close(slope, velocity(clean, noise))


def test_the_true_velocity_leads_back_to_the_clean_clip(clean, noise):
    t = torch.tensor([[0.1, 0.5, 1.0], [0.0, 0.3, 0.9]])
    assert_close(clean_from_velocity(noised(clean, noise, t), velocity(clean, noise), t), clean)


def test_clean_and_velocity_are_two_forms_of_one_prediction(clean, noise):
    t = torch.tensor([[0.1, 0.5, 1.0], [0.02, 0.3, 0.9]])
    noisy = noised(clean, noise, t)
    assert_close(velocity_from_clean(noisy, clean, t), velocity(clean, noise), rtol=1e-4, atol=1e-4)
    assert_close(clean_from_velocity(noisy, velocity_from_clean(noisy, noise, t), t), noise)


def test_shift_5_warps_the_usual_steps_to_the_usual_times():
    # 750: 5 x 0.75 / (1 + 4 x 0.75) = 3.75 / 4; 500: 2.5 / 3; 250: 1.25 / 2.
    assert schedule([1000, 750, 500, 250], shift=5.0) == pytest.approx([1.0, 0.9375, 2.5 / 3, 0.625])


def test_shift_1_warps_nothing_and_both_ends_stay():
    assert schedule([1000, 400, 100], shift=1.0) == pytest.approx([1.0, 0.4, 0.1])
    assert warped(0, shift=7.0) == 0
    assert warped(1000, shift=7.0) == 1


def test_the_table_falls_from_noise_to_almost_clean():
    times = table(5.0)
    assert times.shape == (1000,)
    assert times[0] == 1
    assert float(times[-1]) == pytest.approx(0.005 / 1.004)  # 5 s / (1 + 4 s) at s = 0.001
    assert (times.diff() < 0).all()


def test_the_samplers_steps_are_entries_of_the_table():
    times = table(5.0).tolist()
    assert schedule([1000, 750, 500, 250], 5.0) == [times[0], times[250], times[500], times[750]]


def test_the_nearest_time_of_an_entry_is_itself_and_that_of_0_the_smallest():
    times = table(5.0).tolist()
    assert nearest_time(times[123], 5.0) == times[123]
    assert nearest_time(0.0, 5.0) == times[-1]
    assert nearest_time((0.7 * times[400] + 0.3 * times[401]), 5.0) == times[400]
