"""mp4 <-> array: exact where lossless, equal in both decoders, plain words on bad input."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from afd_data import video
from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.video import Probe, check_frames, probe, read_video, write_mp4

CLIPS = sorted((Path(__file__).parents[1] / "data" / "clips").glob("*.[mw][ke]*"))
LOSSLESS = VideoConfig(lossless=True)


def noise(width: int, height: int, frames: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def written(path: Path, frames: np.ndarray, video: VideoConfig = LOSSLESS) -> Path:
    write_mp4(path, frames, video)
    return path


@pytest.mark.parametrize("width", [8, 16, 24, 32, 48, 64, 72])
def test_lossless_comes_back_bit_for_bit_from_both_decoders(tmp_path: Path, width: int) -> None:
    frames = noise(width, 16)
    path = written(tmp_path / "a.mp4", frames)
    for decoder in ("auto", "decord", "pyav"):
        assert np.array_equal(read_video(path, decoder).frames, frames)


@pytest.mark.parametrize("lossless", [True, False])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, lossless: bool) -> None:
    video = VideoConfig(lossless=lossless)
    first, second = (written(tmp_path / name, noise(32, 32), video).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert first == second


def test_lossy_colours_stay_within_three_levels(tmp_path: Path) -> None:
    frames = np.empty((12, 32, 32, 3), np.uint8)
    frames[:] = (200, 30, 90)
    path = written(tmp_path / "a.mp4", frames, VideoConfig(crf=10))
    assert np.abs(read_video(path).frames.astype(int) - frames).max() <= 3


@pytest.mark.parametrize("lossless", [True, False])
def test_both_decoders_agree_on_what_we_write(tmp_path: Path, lossless: bool) -> None:
    path = written(tmp_path / "a.mp4", noise(64, 32), VideoConfig(lossless=lossless))
    assert np.array_equal(read_video(path, "decord").frames, read_video(path, "pyav").frames)


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.suffix[1:])
def test_both_decoders_agree_on_real_clips(path: Path) -> None:
    by_decord, by_pyav = read_video(path, "decord"), read_video(path, "pyav")
    assert np.array_equal(by_decord.frames, by_pyav.frames)
    assert len(by_pyav.frames) == probe(path).frames


def test_a_file_and_its_bytes_give_the_same_video(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", noise(16, 16))
    assert np.array_equal(read_video(path).frames, read_video(path.read_bytes()).frames)


@pytest.mark.parametrize("fps", [8.0, 23.976, 29.97, 15.5])
def test_the_rate_survives(tmp_path: Path, fps: float) -> None:
    path = written(tmp_path / "a.mp4", noise(16, 16), VideoConfig(fps=fps))
    assert probe(path).fps == pytest.approx(fps, abs=1e-3)
    assert read_video(path).fps == pytest.approx(fps, abs=1e-3)


def test_the_index_stands_before_the_frames(tmp_path: Path) -> None:
    data = written(tmp_path / "a.mp4", noise(16, 16)).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_clip_filmed_sideways_is_turned_by_both_decoders(tmp_path: Path) -> None:
    frames = noise(64, 32)
    data = written(tmp_path / "a.mp4", frames).read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    place = data.index(upright, data.index(b"tkhd"))  # the track's display matrix
    sideways = data[:place] + turned + data[place + 36 :]
    for decoder in ("decord", "pyav"):
        assert np.array_equal(read_video(sideways, decoder).frames, np.rot90(frames, k=3, axes=(1, 2)))


def bad_inputs(good: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "the file is empty"),
        "html": (b"<!DOCTYPE html><title>404</title>", "an HTML page, not a video"),
        "random": (bytes(range(256)) * 20, "not a video"),
        "half the frames": (good[: len(good) // 2], "truncated: it declares 12 frames"),
        "half the index": (good[: good.index(b"mdat") // 2], "truncated or damaged"),
        "only the head": (good[:40], "no video track"),
    }


@pytest.mark.parametrize("case", ["empty", "html", "random", "half the frames", "half the index", "only the head"])
@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_bad_input_is_named_and_diagnosed(tmp_path: Path, case: str, decoder: str, capfd) -> None:
    data, message = bad_inputs(written(tmp_path / "a.mp4", noise(32, 32)).read_bytes())[case]
    (tmp_path / "bad.mp4").write_bytes(data)
    for source, name in ((data, "clip 7"), (tmp_path / "bad.mp4", None)):
        with pytest.raises(UserError, match=message) as error:
            read_video(source, decoder, name)  # type: ignore[arg-type]
        assert str(error.value).startswith(name or str(tmp_path / "bad.mp4"))
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.mp4: no such file"):
        read_video(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 16, 16, 3)), np.zeros((2, 16, 16), np.uint8), np.zeros((0, 16, 16, 3), np.uint8)]
)
def test_frames_of_another_shape_or_type_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        check_frames(frames)


def test_odd_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be even"):
        check_frames(np.zeros((2, 15, 16, 3), np.uint8))


def test_noise_of_low_contrast_gives_the_same_bytes_every_time(tmp_path):
    # x264's default settings give two or three different files here.
    noise = np.random.default_rng(0).normal(128, 20, (4, 16, 32, 3)).clip(0, 255).astype(np.uint8)
    frames = noise.repeat(6, 1).repeat(6, 2)
    config = VideoConfig(width=192, height=96, frames=4, fps=8.0)
    files = set()
    for size in range(0, 60_000, 3_000):
        _elsewhere = bytes(size)  # moves the encoder's buffers
        write_mp4(tmp_path / "noise.mp4", frames, config)
        files.add((tmp_path / "noise.mp4").read_bytes())
    assert len(files) == 1


def test_what_would_fill_the_memory_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.mp4", noise(32, 16))
    monkeypatch.setattr(video, "MAX_PIXELS", 12 * 32 * 16)
    assert len(read_video(path).frames) == 12
    monkeypatch.setattr(video, "MAX_PIXELS", 12 * 32 * 16 - 1)
    with pytest.raises(UserError, match=r"a\.mp4: more than 6143 pixels in its frames"):
        read_video(path)


def test_more_packed_bytes_than_memory_is_meant_for_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.mp4", noise(32, 16))  # 12 frames of 1536 bytes, which noise does not let shrink
    monkeypatch.setattr(video, "MAX_PACKED", 12 * 1536)
    with pytest.raises(UserError, match=r"a\.mp4: more than 18432 bytes of video"):
        read_video(path)


def test_a_check_sees_the_facts_and_can_keep_a_video_from_being_decoded(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", noise(32, 16))
    seen = []
    read_video(path, check=seen.append)
    assert seen == [probe(path)]

    def refuse(facts: Probe) -> None:
        raise UserError(f"{facts.frames} frames are not wanted")

    with pytest.raises(UserError, match=r"^12 frames are not wanted$"):
        read_video(path, check=refuse)
