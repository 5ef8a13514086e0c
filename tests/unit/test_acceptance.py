"""Which videos are taken, and when two are twins."""

from typing import Any

import numpy as np
import pytest

from afd_data.acceptance import (
    TWIN_LEVELS,
    Hashes,
    RejectedError,
    check_light,
    check_motion,
    is_twin,
    make_mp4,
    perceptual_hash,
    read_and_check,
    shape_problem,
    thumbnail,
)
from afd_data.config import CacheConfig, VideoConfig
from afd_data.teacher_config import FlawsConfig
from afd_data.teachers.world import simulate
from afd_data.video import Probe, read_video, write_mp4

VIDEO = VideoConfig(lossless=True)  # 16x16, 12 frames at 8 fps
RULES = CacheConfig()


def moving_square(frames: int = 12, side: int = 16, colour: int = 200) -> np.ndarray:
    """A square that goes one pixel to the right every frame."""
    clip = np.full((frames, side, side, 3), 50, np.uint8)
    for index in range(frames):
        left = index % (side - 4)
        clip[index, 4:8, left : left + 4] = colour
    return clip


def test_a_video_as_asked_for_is_taken(tmp_path):
    write_mp4(tmp_path / "x.mp4", moving_square(), VIDEO)
    assert np.array_equal(read_and_check(tmp_path / "x.mp4", VIDEO, RULES).frames, moving_square())


@pytest.mark.parametrize(
    "delivered",
    [VideoConfig(frames=11), VideoConfig(fps=12.0), VideoConfig(width=18, height=18)],
    ids=["frames", "fps", "size"],
)
def test_another_shape_is_rejected_with_both_shapes(tmp_path, delivered):
    write_mp4(tmp_path / "x.mp4", moving_square(delivered.frames, delivered.width), delivered)
    with pytest.raises(RejectedError, match=r"wrong shape: .*asked for 16x16, 12 frames at 8 fps"):
        read_and_check(tmp_path / "x.mp4", VIDEO, RULES)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", bytes(5000)])
def test_what_is_no_video_is_rejected(tmp_path, data):
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(RejectedError, match="undecodable: "):
        read_and_check(tmp_path / "x.mp4", VIDEO, RULES)


def test_a_truncated_video_is_rejected(tmp_path):
    write_mp4(tmp_path / "x.mp4", moving_square(), VIDEO)
    (tmp_path / "x.mp4").write_bytes((tmp_path / "x.mp4").read_bytes()[:-200])
    with pytest.raises(RejectedError, match="undecodable: "):
        read_and_check(tmp_path / "x.mp4", VIDEO, RULES)


def facts(**changed: Any) -> Probe:
    there: dict[str, Any] = {"width": 16, "height": 16, "frames": 12, "fps": 8.0}
    rest = {"codec": "h264", "pixel_format": "yuv420p", "declared_frames": 12, "video_tracks": 1, "sound_tracks": 0}
    return Probe(**there | changed | rest)


def test_a_shape_differs_in_size_frames_or_rate():
    assert shape_problem(facts(), VIDEO) == ""
    assert shape_problem(facts(frames=11), VIDEO) == (
        "16x16, 11 frames at 8 fps (1.38 s); asked for 16x16, 12 frames at 8 fps (1.50 s)"
    )
    assert shape_problem(facts(width=18), VIDEO)
    assert shape_problem(facts(height=18), VIDEO)
    assert shape_problem(facts(fps=8.02), VIDEO)


def test_the_rate_of_american_television_counts_as_the_round_one():
    assert shape_problem(facts(fps=24000 / 1001), VideoConfig(fps=24.0)) == ""
    assert shape_problem(facts(fps=30000 / 1001), VideoConfig(fps=30.0)) == ""
    assert shape_problem(facts(fps=24.0), VideoConfig(fps=25.0))


def test_a_video_without_light_is_rejected():
    clip = np.zeros((3, 10, 10, 3), np.uint8)
    clip[1, 4, 5, 2] = 3  # one blue pixel in one frame
    check_light(clip, 2.0)
    with pytest.raises(RejectedError, match=r"^black: no pixel is brighter than 3 levels, the limit is 3$"):
        check_light(clip, 3.0)


def test_a_black_video_is_rejected_by_the_recipes_limit(tmp_path):
    write_mp4(tmp_path / "x.mp4", moving_square(colour=60), VIDEO)
    read_and_check(tmp_path / "x.mp4", VIDEO, RULES)
    with pytest.raises(RejectedError, match=r"^black: "):
        read_and_check(tmp_path / "x.mp4", VIDEO, CacheConfig(black=60))


def test_frozen_is_the_mean_change_between_neighbouring_frames():
    clip = np.zeros((3, 10, 10, 3), np.uint8)
    clip[2] = 1  # changes of 0 and 1 level: 0.5 on average
    check_motion(clip, 0.5)
    with pytest.raises(RejectedError, match=r"frozen: frames differ by 0.500 levels on average, less than 0.6"):
        check_motion(clip, 0.6)


def test_a_delivered_h264_mp4_keeps_its_bytes(tmp_path):
    write_mp4(tmp_path / "x.mp4", moving_square(), VIDEO)
    before = (tmp_path / "x.mp4").read_bytes()
    make_mp4(tmp_path / "x.mp4", read_video(tmp_path / "x.mp4"), VideoConfig(), "drop")
    assert (tmp_path / "x.mp4").read_bytes() == before


def test_another_container_becomes_an_mp4(tmp_path):
    import av

    with av.open(str(tmp_path / "x.mp4"), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for rgb in moving_square():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    make_mp4(tmp_path / "x.mp4", read_and_check(tmp_path / "x.mp4", VIDEO, RULES), VIDEO, "drop")
    assert (tmp_path / "x.mp4").read_bytes()[4:8] == b"ftyp"
    assert np.array_equal(read_video(tmp_path / "x.mp4").frames, moving_square())


def test_a_flat_video_has_no_bits():
    assert perceptual_hash(np.full((12, 16, 16, 3), 128, np.uint8)) == "0" * 16


def test_brightness_that_rises_to_the_right_sets_every_bit():
    ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, None, :, None], (12, 16, 16, 3))
    assert perceptual_hash(np.ascontiguousarray(ramp)) == "f" * 16


def test_a_video_compressed_again_is_a_twin(tmp_path):
    clip = moving_square(side=64).repeat(2, axis=0)[:12]
    write_mp4(tmp_path / "x.mp4", clip, VideoConfig(width=64, height=64, crf=28))
    again = read_video(tmp_path / "x.mp4").frames
    assert not np.array_equal(clip, again)
    assert perceptual_hash(clip) == perceptual_hash(again)
    assert is_twin(thumbnail(clip), thumbnail(again))


def test_another_colour_is_no_twin_although_the_hash_may_agree():
    red, blue = (moving_square() for _ in range(2))
    red[..., 1:] = 50
    blue[..., :2] = 50
    assert not is_twin(thumbnail(red), thumbnail(blue))


def test_twins_differ_by_no_more_than_the_limit_in_any_patch():
    clip = np.full((12, 16, 16, 3), 100, np.uint8)
    near, far = clip.copy(), clip.copy()
    near[0, :2, :2] += TWIN_LEVELS  # one patch is 2 x 2 pixels
    far[0, :2, :2] += TWIN_LEVELS + 1
    assert is_twin(thumbnail(clip), thumbnail(near))
    assert not is_twin(thumbnail(clip), thumbnail(far))


def test_the_playgrounds_videos_of_different_seeds_are_no_twins():
    clips = [simulate("a red ball falls", seed, VIDEO, FlawsConfig())[0] for seed in range(60)]
    thumbnails = [thumbnail(clip) for clip in clips]
    twins = sum(is_twin(a, b) for i, a in enumerate(thumbnails) for b in thumbnails[:i])
    assert twins == 0


def test_hashes_are_found_by_the_number_of_differing_bits():
    hashes = Hashes()
    for sample_id, value in enumerate(["0" * 16, "0" * 15 + "1", "0" * 15 + "7", "f" * 16], start=1):
        hashes.add(sample_id, value)
    assert list(hashes.near("0" * 16, 0)) == [1]
    assert list(hashes.near("0" * 16, 1)) == [1, 2]
    assert list(hashes.near("0" * 16, 3)) == [1, 2, 3]
    assert list(hashes.near("0" * 16, 64)) == [1, 2, 3, 4]


def test_hashes_grow():
    hashes = Hashes()
    for sample_id in range(3000):
        hashes.add(sample_id, f"{sample_id:016x}")
    assert list(hashes.near(f"{2999:016x}", 0)) == [2999]
