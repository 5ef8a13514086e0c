"""Motion metrics on drawn videos whose motion is known."""

import numpy as np
import pytest

from afd_train.evaluation import motion, quality


def disc_video(speed_px: float, side: int = 16, frames: int = 12, radius: float = 2.5) -> np.ndarray:
    """A red disc that moves right at `speed_px` a frame, anti-aliased by 8 x 8 samples.  uint8 [F, H, W, 3]."""
    fine = (np.arange(side * 8) + 0.5) / 8
    video = []
    for time in range(frames):
        inside = (fine[None] - 3 - speed_px * time) ** 2 + (fine[:, None] - side / 2) ** 2 < radius**2
        share = inside.reshape(side, 8, side, 8).mean(axis=(1, 3))[..., None]
        video.append(235 + share * (np.array([220.0, 60.0, 40.0]) - 235))
    return np.round(video).astype(np.uint8)


def test_a_still_video_has_no_motion_no_error_and_only_duplicates():
    values = motion.measure(disc_video(0.0), fps=8.0)
    assert values["dynamic_degree_dis"] == 0
    assert values["motion_mag_dis"] == pytest.approx(0, abs=1e-3)
    assert values["warp_rmse_dis"] == pytest.approx(0, abs=1e-3)
    assert values["smooth_dis"] == pytest.approx(1, abs=1e-3)
    assert values["flicker"] == 1
    assert values["duplicate_frames"] == 1


@pytest.mark.parametrize("side", [16, 64, 160])
def test_a_discs_speed_is_measured_in_units_of_a_256_pixel_side(side):
    # 1/16 of the width a frame at 8 fps is 16 px of 256, in a small world as in a large one.
    values = motion.measure(disc_video(side / 16, side, frames=6, radius=side / 6), fps=8.0)
    assert values["motion_mag_dis"] == pytest.approx(16, rel=0.06)
    assert values["dynamic_degree_dis"] == 1


def test_frames_are_compared_an_eighth_of_a_second_apart_whatever_the_rate():
    # At 16 fps every second frame counts, so half the speed a frame is the same speed a second.
    slow = motion.measure(disc_video(1.0, frames=6), fps=8.0)["motion_mag_dis"]
    fast = motion.measure(disc_video(0.5, frames=11), fps=16.0)["motion_mag_dis"]
    assert fast == pytest.approx(slow, rel=0.05)


def test_flicker_is_one_minus_the_mean_step_between_frames():
    video = np.zeros((3, 16, 16, 3), np.uint8)
    video[1] = 51  # steps of +51 and -51 levels: 1 - 51/255
    assert motion.measure(video, fps=8.0)["flicker"] == pytest.approx(0.8)


def test_repeated_frames_are_counted():
    video = np.repeat(disc_video(0.8, frames=4), 2, axis=0)
    assert motion.measure(video, fps=8.0)["duplicate_frames"] == pytest.approx(4 / 7)


def test_shuffled_frames_warp_and_interpolate_worse_than_ordered_ones():
    video = disc_video(0.7)
    ordered = motion.measure(video, fps=8.0)
    shuffled = motion.measure(video[np.random.default_rng(0).permutation(len(video))], fps=8.0)
    assert shuffled["warp_rmse_dis"] > 1.5 * ordered["warp_rmse_dis"]
    assert shuffled["smooth_dis"] < ordered["smooth_dis"]


def test_a_flickering_brightness_raises_the_warp_error():
    video = disc_video(0.7).astype(float)
    video[::2] *= 0.92
    dimmed = motion.measure(np.round(video).astype(np.uint8), fps=8.0)
    assert dimmed["warp_rmse_dis"] > 2 * motion.measure(disc_video(0.7), fps=8.0)["warp_rmse_dis"]


def test_two_frames_are_enough_for_all_but_smoothness():
    values = motion.measure(disc_video(1.0, frames=2), fps=8.0)
    assert np.isnan(values.pop("smooth_dis"))
    assert all(np.isfinite(value) for value in values.values())


def test_every_value_has_a_definition_and_every_definition_a_value():
    assert motion.measure(disc_video(1.0), fps=8.0).keys() == motion.METRICS.keys()
    assert quality.measure(disc_video(1.0)).keys() == quality.METRICS.keys()


def test_a_flat_grey_video_has_no_contrast_edges_colour_or_clipping():
    values = quality.measure(np.full((2, 8, 8, 3), 128, np.uint8))
    assert values == {"sharpness": 0, "contrast": 0, "saturation": 0, "clipping": 0}


def test_clipping_and_contrast_of_a_half_black_half_white_frame():
    video = np.zeros((1, 8, 8, 3), np.uint8)
    video[:, :, 4:] = 255
    values = quality.measure(video)
    assert values["clipping"] == 1
    assert values["contrast"] == pytest.approx(127.5)


def test_a_blurred_video_is_less_sharp():
    import cv2

    video = disc_video(1.0)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in video])
    assert quality.measure(blurred)["sharpness"] < 0.6 * quality.measure(video)["sharpness"]
