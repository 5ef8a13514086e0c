"""What a teacher delivered becomes what was asked for: bytes that are right stay, sound comes along."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest

from afd_data.acceptance import RejectedError, make_mp4, read_and_check
from afd_data.config import CacheConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.files import file_sha256
from afd_data.sound import RATE, drop_sound
from afd_data.teacher_config import Adaptation
from afd_data.teachers import Request, UnreachableError
from afd_data.teachers.clip import bring_frames
from afd_data.teachers.delivery import deliver
from afd_data.video import probe, read_video, write_mp4

VIDEO = VideoConfig(lossless=True)  # 16x16, 12 frames at 8 fps: 1.5 s
RULES = Adaptation()


def asked(**video: Any) -> Request:
    return Request("f" * 64, "p0", "a ball", 0, 1, VIDEO.model_copy(update=video))


def levels(frames: int, step: int = 10, side: int = 16) -> np.ndarray:
    """Frame k is grey `step` k.  [F, side, side, 3]"""
    return np.broadcast_to((np.arange(frames) * step).astype(np.uint8)[:, None, None, None], (frames, side, side, 3))


def film(path: Path, frames: np.ndarray, fps: int = 8, tone_from_s: float | None = None) -> None:
    """H.264 with B-frames in mp4, beside it a sound track that is silent and then, from `tone_from_s`, loud."""
    with av.open(str(path), "w", format="mp4") as out:
        pictures = out.add_stream("libx264rgb", rate=fps, options={"crf": "0", "bf": "2"})
        pictures.height, pictures.width, pictures.pix_fmt = *frames.shape[1:3], "rgb24"
        if tone_from_s is not None:
            sound = out.add_stream("aac", rate=44_100, layout="mono")
            count = round(len(frames) / fps * 44_100)
            tone = np.sin(np.arange(count) * 0.1) * (np.arange(count) >= tone_from_s * 44_100)
            for first in range(0, count, 1024):
                piece = av.AudioFrame.from_ndarray(tone[None, first : first + 1024].astype(np.float32), "fltp", "mono")
                piece.sample_rate, piece.pts, piece.time_base = 44_100, first, Fraction(1, 44_100)
                out.mux(sound.encode(piece))
            out.mux(sound.encode(None))
        for rgb in frames:
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        out.mux(pictures.encode(None))


def loudness(path: Path) -> np.ndarray:
    """Mean level of every tenth of a second of the sound track."""
    with av.open(str(path), "r") as container:
        pieces = [frame.to_ndarray() for frame in container.decode(audio=0)]
    samples = np.abs(np.concatenate(pieces, axis=1)).mean(axis=0)
    return samples[: len(samples) // (RATE // 10) * (RATE // 10)].reshape(-1, RATE // 10).mean(axis=1)


def test_a_video_exactly_as_asked_keeps_its_bytes(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(12))
    effective = deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert effective == {
        "width": 16, "height": 16, "frames": 12, "fps": 8.0, "start_s": 0.0, "frames_made_up": 0, "fit": "crop",
        "encoded_again": False, "source": {"width": 16, "height": 16, "frames": 12, "fps": 8.0, "codec": "h264"},
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"frames": 11}, {"width": 18}, {"fps": 4.0}], ids=str)
def test_anything_else_is_brought_to_what_was_asked(tmp_path: Path, change: dict[str, Any]) -> None:
    film(tmp_path / "a", levels(12))
    request = asked(**change)
    effective = deliver(tmp_path / "a", tmp_path / "b", request, RULES, "a")
    facts = probe(tmp_path / "b")
    shape = (facts.width, facts.height, facts.frames, facts.fps)
    assert shape == (request.video.width, 16, request.video.frames, request.video.fps)
    assert effective["encoded_again"]


def test_another_codec_in_the_right_shape_is_encoded_again(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a"), "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for rgb in levels(12):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        out.mux(stream.encode(None))
    effective = deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")
    assert (effective["encoded_again"], effective["source"]["codec"]) == (True, "mpeg4")
    assert probe(tmp_path / "b").codec == "h264"


def test_frames_that_are_out_of_time_are_put_in_time(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a"), "w", format="mp4") as out:  # 12 frames in 1.5 s, the last 11 crowded at the end
        stream = out.add_stream("libx264rgb", rate=8, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        stream.codec_context.time_base = Fraction(1, 800)
        for index, rgb in enumerate(levels(12)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = (0 if index == 0 else 1000 + 10 * index), Fraction(1, 800)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")["encoded_again"]
    assert read_video(tmp_path / "b").frames[:4].max() == 0  # for half a second the first frame is the nearest


def test_a_file_can_be_delivered_in_its_own_place(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(20))
    deliver(tmp_path / "a", tmp_path / "a", asked(), RULES, "a")
    assert probe(tmp_path / "a").frames == 12


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "job 7: the file is empty"), (b"<html>", "job 7: an HTML page"), (bytes(999), "job 7: not a video")],
)
def test_what_is_no_video_is_rejected_by_its_name(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RejectedError, match=f"^undecodable: {reason}"):
        deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "job 7")
    assert not (tmp_path / "b").exists()


def test_a_video_too_short_is_rejected_where_the_rules_say_so(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(4))
    with pytest.raises(RejectedError, match=r"^too short: job 7: 0\.50 s, asked for 1\.50 s$"):
        deliver(tmp_path / "a", tmp_path / "b", asked(), Adaptation(short="reject"), "job 7")


def test_sound_is_cut_to_the_time_of_the_clip(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(24), tone_from_s=1.5)  # 3 s; the middle half is 0.75 to 2.25 s
    request = asked()
    deliver(tmp_path / "a", tmp_path / "b", request, Adaptation(start="middle"), "a")
    loud = loudness(tmp_path / "b")
    assert len(loud) in (15, 16)  # AAC rounds up to 1024 samples
    assert loud[:7].max() < 0.05 < 0.3 < loud[8:15].min()  # the tone begins at 0.75 s
    assert read_video(tmp_path / "b").frames[:, 0, 0, 0].tolist() == [10 * k for k in range(6, 18)]


def test_a_clip_that_is_filled_up_ends_in_silence(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(4), tone_from_s=0.0)
    deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")
    loud = loudness(tmp_path / "b")
    assert loud[:4].min() > 0.3
    assert loud[7:].max() < 0.05


def test_the_same_delivery_gives_the_same_bytes(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(24), tone_from_s=0.0)
    for name in ("b", "c"):
        deliver(tmp_path / "a", tmp_path / name, asked(), RULES, "a")
    assert file_sha256(tmp_path / "b") == file_sha256(tmp_path / "c")


def test_sound_is_dropped_without_touching_a_packet_of_the_pictures(tmp_path: Path) -> None:
    def packets(path: Path) -> list[bytes]:
        with av.open(str(path), "r") as container:
            return [bytes(packet) for packet in container.demux(video=0) if packet.size]

    film(tmp_path / "a", levels(12), tone_from_s=0.0)
    before = probe(tmp_path / "a")
    for name in ("b", "c"):
        (tmp_path / name).write_bytes((tmp_path / "a").read_bytes())
        drop_sound(tmp_path / name)
    assert probe(tmp_path / "b").sound_tracks == 0
    assert packets(tmp_path / "b") == packets(tmp_path / "a")
    assert probe(tmp_path / "b") == replace(before, sound_tracks=0)
    assert np.array_equal(read_video(tmp_path / "b").frames, levels(12))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("audio", ["drop", "keep"])
def test_the_recipe_says_whether_sound_stays(tmp_path: Path, audio: Any) -> None:
    film(tmp_path / "a.mp4", levels(12), tone_from_s=0.0)
    before = (tmp_path / "a.mp4").read_bytes()
    make_mp4(tmp_path / "a.mp4", read_video(tmp_path / "a.mp4"), VIDEO, audio)
    assert probe(tmp_path / "a.mp4").sound_tracks == (audio == "keep")
    assert ((tmp_path / "a.mp4").read_bytes() == before) == (audio == "keep")


def test_drawn_frames_are_cut_filled_up_and_fitted() -> None:
    def shown(count: int, **rules: Any) -> list[int]:
        clip = bring_frames(VIDEO, levels(count, side=32), "a", Adaptation(**rules))
        assert clip.frames.shape == (12, 16, 16, 3)
        return [round(int(frame[8, 8, 0]) / 10) for frame in clip.frames]

    assert shown(13) == list(range(12))
    assert shown(16, start="middle") == list(range(2, 14))
    assert shown(9) == [*range(9), 8, 8, 8]
    with pytest.raises(RejectedError, match="too short: a: 9 frames, asked for 12"):
        shown(9, short="reject")


def test_a_video_without_sound_gets_none(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a", levels(20), VIDEO)
    deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")
    assert probe(tmp_path / "b").sound_tracks == 0


@pytest.mark.parametrize("frames", [12, 20], ids=["as asked", "encoded again"])
@pytest.mark.parametrize("audio", ["keep", "drop"])
def test_sound_of_a_codec_that_nobody_knows_is_no_sound(
    tmp_path: Path, frames: int, audio: Literal["keep", "drop"]
) -> None:
    film(tmp_path / "a", levels(frames), tone_from_s=0.0)
    foreign(tmp_path / "a")
    deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "a")
    make_mp4(tmp_path / "b", read_video(tmp_path / "b"), VIDEO, audio)
    assert np.array_equal(read_video(tmp_path / "b").frames, levels(12))
    assert probe(tmp_path / "b").sound_tracks == (frames == 12 and audio == "keep")  # a video as asked keeps its bytes


def foreign(path: Path) -> None:
    """Make the sound of an mp4 one of a codec that has no decoder."""
    data = bytearray(path.read_bytes())
    assert data.count(b"mp4a") == 1
    at = data.index(b"\x40\x15", data.index(b"esds"))  # the type of the sound in its decoder's configuration
    data[at] = 0xDD
    at = data.index(b"mp4a")
    data[at : at + 4] = b"ac-4"
    path.write_bytes(data)


@contextmanager
def no_more_files() -> Iterator[None]:
    """A process that has as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


def test_a_machine_that_can_open_no_more_files_is_not_the_fault_of_the_video(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(12))
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        read_and_check(tmp_path / "a", VIDEO, CacheConfig())
    with no_more_files(), pytest.raises(UnreachableError, match=r"^job 7 cannot be worked on here now: Too many open"):
        deliver(tmp_path / "a", tmp_path / "b", asked(), RULES, "job 7")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile '{other}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n{other}\n#EXT-X-ENDLIST\n",
    ],
    ids=["ffconcat", "HLS"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a"])
def test_a_script_that_plays_other_files_is_no_video(tmp_path: Path, script: str, name: str) -> None:
    film(tmp_path / "private.mp4", levels(12))
    other = "private.mp4" if "ffconcat" in script else tmp_path / "private.mp4"  # as each would accept it
    (tmp_path / name).write_text(script.format(other=other))
    with pytest.raises(RejectedError, match=r"^undecodable: job 7: not a video"):
        deliver(tmp_path / name, tmp_path / "b", asked(), RULES, "job 7")
    with pytest.raises(UserError, match="not a video"):
        read_video((tmp_path / name).read_bytes(), decoder="pyav")


def test_a_reason_does_not_tell_where_the_video_lies(tmp_path: Path) -> None:
    film(tmp_path / "a", levels(12))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-900])
    with pytest.raises(RejectedError, match=r"^undecodable: the video: ") as caught:
        read_and_check(tmp_path / "a", VIDEO, CacheConfig())
    assert str(tmp_path) not in str(caught.value)
