"""The pixel autoencoder: exact on 8-bit video, and the same quantisation for every clip."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from afd_train.student_config import StudentConfig
from afd_train.students.autoencoders import PixelAutoencoder


def autoencoder(**settings) -> PixelAutoencoder:
    return PixelAutoencoder(StudentConfig(**settings))


def every_level() -> torch.Tensor:
    """A video in which every channel takes all of 0..255: uint8 [1, 2, 16, 16, 3]."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    frame = np.stack([levels, levels[::-1], levels.T], -1)
    return torch.from_numpy(np.stack([frame, 255 - frame])[None].copy())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pixel_factor": 1},
        {"pixel_factor": 8, "pixel_scale": 0.1},
        {"pixel_centre": (205, 3, 255), "pixel_scale": 7.3},
    ],
)
def test_8_bit_video_comes_back_exactly(settings):
    video = every_level()
    found = autoencoder(**settings)
    assert torch.equal(found.decode(found.encode(video)), video)


def test_latents_are_cells_of_pixels_centred_and_scaled():
    video = torch.full((1, 1, 4, 8, 3), 128, dtype=torch.uint8)
    video[0, 0, 3, 6] = torch.tensor([255, 128, 1])  # red and blue 127 above and below the centre
    latents = autoencoder(pixel_factor=4, pixel_scale=2.0).encode(video)
    assert latents.shape == (1, 1, 48, 1, 2)
    # row 3, column 6 lies in the second cell at offset (3, 2): channel 16 c + 4 x 3 + 2.
    red, blue = latents[0, 0, 14, 0, 1], latents[0, 0, 46, 0, 1]
    assert_close(red, torch.tensor(2 * 127 / 127.5))
    assert_close(blue, torch.tensor(-2 * 127 / 127.5))
    assert int(latents.count_nonzero()) == 2  # the background is 0


def test_a_round_trip_changes_nothing_that_came_from_8_bit_video():
    found = autoencoder()
    latents = found.encode(every_level())
    assert torch.equal(found.round_trip(latents), latents)


def test_a_second_round_trip_changes_nothing():
    found = autoencoder()
    latents = 3 * torch.randn(2, 3, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    once = found.round_trip(latents)
    assert not torch.equal(once, latents)
    assert torch.equal(found.round_trip(once), once)


def test_a_round_trip_moves_latents_by_half_a_level_at_most():
    found = autoencoder(pixel_scale=2.0)
    latents = 1.98 * (2 * torch.rand(1, 2, 48, 4, 4, generator=torch.Generator().manual_seed(0)) - 1)  # within 0..255
    assert (found.round_trip(latents) - latents).abs().max() <= 0.5 * 2.0 / 127.5 + 1e-6


def test_what_is_brighter_than_white_becomes_white():
    found = autoencoder()
    assert found.decode(torch.full((1, 1, 48, 1, 1), 100.0)).unique().tolist() == [255]
    assert found.decode(torch.full((1, 1, 48, 1, 1), -100.0)).unique().tolist() == [0]


def test_a_stream_of_pixels_gives_the_frames_of_the_whole():
    found = autoencoder()
    latents = torch.randn(2, 3, 48, 4, 4, generator=torch.Generator().manual_seed(0))
    stream = found.stream()
    assert torch.equal(torch.cat([stream(latents[:, :1]), stream(latents[:, 1:])], 1), found.decode(latents))


def test_pixel_settings_that_change_latents_change_the_identity():
    settings: list[dict] = [{}, {"pixel_factor": 2}, {"pixel_scale": 4.0}, {"pixel_centre": (128, 128, 129)}]
    assert len({autoencoder(**each).identity for each in settings}) == 4
    assert autoencoder().identity == autoencoder(dim=256).identity
