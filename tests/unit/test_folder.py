"""Teacher `folder`: what becomes of clips of other sizes, rates and lengths, and of captions that do not fit."""

from __future__ import annotations

import hashlib
import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from afd_data.config import FolderConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.teachers import FailedError, RefusedError, Request
from afd_data.teachers.clip import fitted, held, played_again
from afd_data.teachers.folder import Folder
from afd_data.video import read_video, write_mp4

CLIPS = Path(__file__).parents[1] / "data" / "clips"


def grey_levels(frames: int, step: int = 10) -> np.ndarray:
    """Frame k is grey `step` k: a frame of the result tells which one of the source it was.  [F, 16, 16, 3]"""
    return np.broadcast_to((np.arange(frames) * step).astype(np.uint8)[:, None, None, None], (frames, 16, 16, 3))


def folder(path: Path, captions: str = "file,caption\na.mp4,a ball\n", **rules: object) -> Folder:
    (path / "captions.csv").write_text(captions)
    return Folder(FolderConfig(path=str(path), **rules))  # type: ignore[arg-type]


def clip(path: Path, frames: int = 12, fps: float = 8.0, step: int = 10) -> None:
    write_mp4(path, grey_levels(frames, step), VideoConfig(lossless=True, fps=fps))


def asked(caption: str = "a ball", take: int = 0, frames: int = 12, fps: float = 8.0) -> Request:
    return Request("f" * 64, "p0", caption, take, 1, VideoConfig(frames=frames, fps=fps, lossless=True))


def fetched(teacher: Folder, request: Request, target: Path) -> np.ndarray:
    teacher.fetch(teacher.submit(request), request, target)
    return read_video(target).frames


def levels(teacher: Folder, request: Request, target: Path) -> list[int]:
    """Source frame that each frame of the result shows."""
    return [round(int(frame[0, 0, 0]) / 10) for frame in fetched(teacher, request, target)]


def test_half_the_rate_drops_every_other_frame(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=12, fps=8)
    assert levels(folder(tmp_path), asked(frames=6, fps=4), tmp_path / "out") == [0, 2, 4, 6, 8, 10]


def test_twice_the_rate_repeats_the_nearest_frame_the_earlier_one_on_a_tie(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=4, fps=8)
    assert levels(folder(tmp_path), asked(frames=8, fps=16), tmp_path / "out") == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_rate_takes_the_frame_nearest_in_time(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=20, fps=10)
    # wanted at k/4 s, source frames at n/10 s: 0, .25 (tie of .2 and .3), .5, .75 (tie), 1.0
    assert levels(folder(tmp_path), asked(frames=5, fps=4), tmp_path / "out") == [0, 2, 5, 7, 10]


def test_the_middle_is_taken(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=12, fps=8)
    assert levels(folder(tmp_path, start="middle"), asked(frames=4), tmp_path / "out") == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("short", "expected"), [("hold", [0, 1, 2, 3, 3, 3, 3, 3]), ("loop", [0, 1, 2, 3, 2, 1, 0, 1])]
)
def test_a_short_clip_is_held_or_played_backwards(tmp_path: Path, short: str, expected: list[int]) -> None:
    clip(tmp_path / "a.mp4", frames=4)
    teacher, request = folder(tmp_path, short=short), asked(frames=8)
    assert levels(teacher, request, tmp_path / "out") == expected
    assert teacher.fetch(teacher.submit(request), request, tmp_path / "out").effective["frames_made_up"] == 4


def test_a_short_clip_is_refused_where_the_rules_say_so(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", frames=4)
    with pytest.raises(RefusedError, match=r"^too short: a\.mp4: 0\.50 s, asked for 1\.00 s"):
        fetched(folder(tmp_path, short="reject"), asked(frames=8), tmp_path / "out")


def test_frame_indices_of_short_clips() -> None:
    assert held(3, 5) == [0, 1, 2, 2, 2]
    assert played_again(3, 7) == [0, 1, 2, 1, 0, 1, 2]
    assert played_again(1, 3) == [0, 0, 0]


def test_time_stamps_count_not_frame_numbers(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:  # frames at 0, 1, 2, 10, 11 tenths of a second
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for stamp in (0, 1, 2, 10, 11):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * stamp, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 10)
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    teacher = folder(tmp_path, "file,caption\na.mkv,a ball\n")
    assert levels(teacher, asked(frames=6, fps=5), tmp_path / "out") == [0, 2, 2, 2, 10, 10]


def test_cropping_keeps_the_centre_and_never_stretches() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (fitted(wide, VideoConfig(width=8, height=8), "crop") == 200).all()


def test_padding_keeps_everything_and_never_stretches() -> None:
    wide = np.full((8, 16, 3), 200, np.uint8)
    padded = fitted(wide, VideoConfig(width=16, height=16), "pad")
    assert (padded[4:12] == 200).all()
    assert (padded[:4] == 0).all()
    assert (padded[12:] == 0).all()


def test_a_square_stays_a_square_when_pixels_are_not() -> None:
    narrow = np.full((16, 8, 3), 200, np.uint8)  # pixels twice as wide as high: it shows a square
    assert (fitted(narrow, VideoConfig(width=16, height=16), "pad", pixel_aspect=2.0) == 200).all()


def test_real_clips_arrive_with_their_provenance(tmp_path: Path) -> None:
    teacher = Folder(FolderConfig(path=str(CLIPS), licence="CC-BY-4.0"))
    sizes = {}
    for caption in teacher.prompts():
        request = asked(caption, frames=17, fps=16)
        job = teacher.submit(request)
        delivery = teacher.fetch(job, request, tmp_path / "out")
        assert read_video(tmp_path / "out").frames.shape == (17, 16, 16, 3)
        file = CLIPS / delivery.provenance["file"]
        assert delivery.provenance["sha256"] == job == hashlib.sha256(file.read_bytes()).hexdigest()
        sizes[file.name] = tuple(delivery.effective["source"][key] for key in ("width", "height", "frames", "fps"))
    assert sizes == {"intel_asl_milk.mkv": (640, 480, 51, 30.0), "moviepy_bbb432.webm": (1280, 720, 24, 24.0)}
    assert teacher.identity.licence == "CC-BY-4.0"


def test_files_with_one_caption_are_its_takes(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", step=10)
    clip(tmp_path / "b.mp4", step=0)
    teacher = folder(tmp_path, "file,caption\nb.mp4,a  ball\na.mp4,a ball\n")
    assert teacher.prompts() == ["a ball"]
    assert levels(teacher, asked(take=0), tmp_path / "out")[-1] == 11
    assert levels(teacher, asked(take=1), tmp_path / "out")[-1] == 0
    with pytest.raises(RefusedError, match="only 2 video"):
        teacher.submit(asked(take=2))
    with pytest.raises(RefusedError, match="has this caption"):
        teacher.submit(asked("a cube"))


def test_captions_from_jsonl_and_from_sidecars(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    clip(tmp_path / "deep" / "a.mp4")
    (tmp_path / "deep" / "a.txt").write_text(" from a sidecar\n")
    assert Folder(FolderConfig(path=str(tmp_path))).prompts() == ["from a sidecar"]
    (tmp_path / "mine.jsonl").write_text('{"file": "deep/a.mp4", "caption": "from a line", "more": 1}\n')
    assert Folder(FolderConfig(path=str(tmp_path), captions="mine.jsonl")).prompts() == ["from a line"]


def test_videos_without_a_caption_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        clip(tmp_path / name)
    assert folder(tmp_path).prompts() == ["a ball"]
    assert "2 of 3 videos have no caption" in caplog.text


BAD = {
    "missing": ("file,caption\nb.mp4,x\n", r"captions\.csv:2.*'b\.mp4' is not in "),
    "twice": ("file,caption\na.mp4,x\na.mp4,y\n", r"'a\.mp4' stands there 2 times"),
    "escape": ("file,caption\n../a.mp4,x\n", r"'\.\./a\.mp4' leads out of the folder"),
    "absolute": ("file,caption\n/etc/passwd,x\n", "'/etc/passwd' leads out of the folder"),
    "not a video": ("file,caption\ncaptions.csv,x\n", "is not a video"),
    "empty": ("file,caption\na.mp4,\n", r"captions\.csv:2: column 'caption': the prompt is empty"),
    "column": ("file,capton\na.mp4,x\n", r"no column 'caption'. Did you mean 'capton'"),
}


@pytest.mark.parametrize("case", BAD)
def test_captions_that_do_not_fit_are_listed(tmp_path: Path, case: str) -> None:
    clip(tmp_path / "a.mp4")
    captions, message = BAD[case]
    with pytest.raises(UserError, match=message):
        folder(tmp_path, captions)


def test_a_folder_that_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        Folder(FolderConfig(path=str(tmp_path / "gone")))
    with pytest.raises(UserError, match="no videos in"):
        Folder(FolderConfig(path=str(tmp_path)))
    clip(tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r"no captions.*a\.txt"):
        Folder(FolderConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"no csv or jsonl file mine\.csv"):
        Folder(FolderConfig(path=str(tmp_path), captions="mine.csv"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"<html>", "an HTML page"), (b"", "the file is empty"), (b"x" * 99, "not a video"), (None, "truncated")],
)
def test_a_file_that_is_no_video_is_refused_with_its_name(tmp_path: Path, content: bytes | None, reason: str) -> None:
    clip(tmp_path / "a.mp4")
    good = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(good[:-30] if content is None else content)
    with pytest.raises(RefusedError, match=rf"^undecodable: a\.mp4: {reason}"):
        fetched(folder(tmp_path), asked(), tmp_path / "out")


def test_a_file_that_changes_after_it_was_asked_for_is_asked_for_again(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    teacher = folder(tmp_path)
    job = teacher.submit(asked())
    clip(tmp_path / "a.mp4", step=5)
    with pytest.raises(FailedError, match="has changed since"):
        teacher.fetch(job, asked(), tmp_path / "out")
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(FailedError, match="has changed since"):
        teacher.fetch(job, asked(), tmp_path / "out")
    clip(tmp_path / "a.mp4", step=5)
    assert teacher.submit(asked()) != job
