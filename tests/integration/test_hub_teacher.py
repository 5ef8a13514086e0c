"""Teacher `hub`: tars and parquet files, on disk and on a Hub, through `afd cache-teacher` and alone."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.index import read_index
from afd_data.journal import open_journal
from afd_data.teacher_config import HubConfig
from afd_data.teachers import FailedError, RefusedError, Request
from afd_data.teachers.hub import Hub, caption_in
from afd_data.video import read_video, write_mp4
from tests.hub_server import HubServer

VIDEO = VideoConfig(lossless=True)  # 16x16, 12 frames at 8 fps


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture
def served(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, and `datasets` talking to it."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    return hub


def noise(seed: int) -> np.ndarray:
    """Noise that moves.  [12, 16, 16, 3]"""
    picture = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    return np.stack([np.roll(picture, n, axis=1) for n in range(12)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Four different videos."""
    path = tmp_path_factory.mktemp("clips") / "x.mp4"
    contents = []
    for seed in range(4):
        write_mp4(path, noise(seed), VIDEO)
        contents.append(path.read_bytes())
    return contents


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    return path


def parquet(
    captions: Sequence[str | None], videos: Sequence[bytes | None], paths: Sequence[str | None] | None = None
) -> bytes:
    """With the features that `datasets` would write."""
    struct = [{"bytes": data, "path": path} for data, path in zip(videos, paths or [None] * len(videos), strict=True)]
    schema = pa.schema(
        [("text", pa.string()), ("clip", pa.struct({"bytes": pa.binary(), "path": pa.string()}))],
        metadata={
            "huggingface": json.dumps(
                {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "clip": {"_type": "Video"}}}}
            )
        },
    )
    out = io.BytesIO()
    pq.write_table(pa.table({"text": captions, "clip": struct}, schema=schema), out)
    return out.getvalue()


def asked(caption: str, take: int = 0) -> Request:
    return Request("f" * 64, "p0", caption, take, 1, VIDEO)


def teacher(dataset: Path | str, **settings: Any) -> Hub:
    return Hub(HubConfig(dataset=str(dataset), **settings))


def fetched(hub_teacher: Hub, request: Request, target: Path) -> np.ndarray:
    hub_teacher.fetch(hub_teacher.submit(request), request, target)
    return read_video(target).frames


def cached(afd: Callable[..., Result], folder: Path, **teacher: Any) -> dict[str, tuple[str, str]]:
    """(state, reason) of every caption after a run of the command."""
    recipe = {
        "out": str(folder / "out"), "video": {"lossless": True}, "prompts": {"source": "teacher"},
        "teacher": {"name": "hub", **teacher}, "cache": {"takes": 2},
    }  # fmt: skip
    (folder / "hub.yaml").write_text(json.dumps(recipe))
    result = afd("cache-teacher", folder / "hub.yaml")
    assert result.exit_code == 0, (result.output, result.exception)
    journal = open_journal(folder / "out" / "cache")
    ends = {f"{row.prompt} {row.take}": (row.state, row.reason) for row in journal.rows()}
    journal.close()
    return ends


def test_a_cache_of_a_folder_of_tars(clips: list[bytes], afd: Callable[..., Result], tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for index, caption in enumerate(("a ball", "a cube", "a ball")):
        record = {"prompt": caption, "score": index / 2 if index else 0}  # `datasets` would turn 0.5 into 0
        members |= {f"{index:03d}.mp4": clips[index], f"{index:03d}.json": json.dumps(record).encode()}
    members |= {"003.mp4": b"<html>gone", "003.json": b'{"prompt": "a page"}'}
    members |= {"004.mp4": clips[3], "004.json": b'{"prompt": '}
    tar(tmp_path / "tars" / "train-0.tar", members)
    ends = cached(afd, tmp_path, dataset=str(tmp_path / "tars"))
    assert {name: state for name, (state, _) in ends.items()} == {
        "a ball 0": "sealed", "a ball 1": "sealed", "a cube 0": "sealed", "a cube 1": "refused",
        "a page 0": "refused", "a page 1": "refused",
    }  # fmt: skip
    assert (
        ends["a page 0"][1]
        == "refused: undecodable: row 3: an HTML page, not a video; the download answered with an error page"
    )
    assert len(read_index(tmp_path / "out" / "cache", "train")) == 3


def test_a_cache_of_a_dataset_on_the_hub(
    clips: list[bytes], afd: Callable[..., Result], served: HubServer, tmp_path: Path
) -> None:
    data = parquet(["a ball", "a cube", None, "a gap"], [*clips[:3], None])
    commit = served.add("alice/clips", {"data/train-0.parquet": data}, kind="datasets")
    ends = cached(afd, tmp_path, dataset="alice/clips", video="clip", caption="text")
    assert {name: state for name, (state, _) in ends.items() if name.endswith("0")} == {
        "a ball 0": "sealed", "a cube 0": "sealed", "a gap 0": "refused"
    }  # fmt: skip
    assert "row 3 of alice/clips, train has no video in 'clip'" in ends["a gap 0"][1]
    (shard,) = (tmp_path / "out" / "cache" / "data" / "train").iterdir()
    with tarfile.open(shard) as file:
        records = [json.load(file.extractfile(name)) for name in file.getnames() if name.endswith("json")]  # type: ignore[arg-type]
    assert {json.loads(record["provenance_json"])["revision"] for record in records} == {commit}


def test_rows_with_one_caption_are_its_takes_and_their_bytes_stay(clips: list[bytes], tmp_path: Path) -> None:
    for index, caption in enumerate((b"a  ball", b"a cube", b"a ball\n")):
        members = {"x.mp4": clips[index], "x.txt": caption}
        tar(tmp_path / "tars" / f"{index}.tar", members)
    hub = teacher(tmp_path / "tars", caption="txt")
    assert hub.prompts() == ["a ball", "a cube"]
    assert np.array_equal(fetched(hub, asked("a ball", 0), tmp_path / "a"), noise(0))
    assert np.array_equal(fetched(hub, asked("a ball", 1), tmp_path / "b"), noise(2))
    assert (tmp_path / "b").read_bytes() == clips[2]
    with pytest.raises(RefusedError, match=r"only 2 row\(s\) have this caption, take 3"):
        hub.submit(asked("a ball", 2))
    with pytest.raises(RefusedError, match=r"no row of .* has this caption"):
        hub.submit(asked("a cone"))


def test_pickles_in_tars_stay_bytes(clips: list[bytes], tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    endings = ("pyd", "pickle", "pkl", "pth", "npy", "npz", "ten", "cbor", "mp")
    tar(tmp_path / "tars" / "0.tar", {"0.mp4": clips[0], "0.txt": b"a ball"} | {f"0.{e}": bomb for e in endings})
    assert np.array_equal(fetched(teacher(tmp_path / "tars", caption="txt"), asked("a ball"), tmp_path / "a"), noise(0))
    assert not (tmp_path / "exploded").exists()


def test_a_row_that_names_a_file_of_this_machine_gets_nothing(
    clips: list[bytes], served: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "private.mp4").write_bytes(clips[0])
    data = parquet(["a ball"], [None], [str(tmp_path / "private.mp4")])
    served.add("alice/clips", {"train.parquet": data}, kind="datasets")
    hub = teacher("alice/clips", video="clip", caption="text")
    with pytest.raises(RefusedError, match=r"row 0 of .* has no video"):
        hub.submit(asked("a ball"))


def test_a_row_that_names_a_file_of_another_dataset_gets_nothing(
    clips: list[bytes], served: HubServer, tmp_path: Path
) -> None:
    table = b"file_name,text\n0.mp4,a ball\n"
    served.add("bob/private", {"train/0.mp4": clips[0], "train/metadata.csv": table}, kind="datasets")
    private = teacher("bob/private", video="video", caption="text")
    path = private._rows.with_format("arrow")[0]["video"].to_pylist()[0]["path"]
    assert Path(path).is_file()
    served.add("alice/clips", {"train.parquet": parquet(["a ball"], [None], [path])}, kind="datasets")
    hub = teacher("alice/clips", video="clip", caption="text")
    with pytest.raises(RefusedError, match=r"row 0 of .* has no video"):
        hub.submit(asked("a ball"))


@pytest.mark.parametrize("path", ["\0x", "~nobody", "x" * 5000, 5])
def test_a_row_whose_path_is_none_gets_nothing(tmp_path: Path, path: str | int) -> None:
    (tmp_path / "files").mkdir()
    table = pa.table({"clip": [{"bytes": None, "path": path}], "text": ["a ball"]})
    pq.write_table(table, tmp_path / "files" / "train.parquet")
    hub = teacher(tmp_path / "files", video="clip", caption="text")
    with pytest.raises(RefusedError, match=r"row 0 of .* has no video"):
        hub.submit(asked("a ball"))


def test_a_dataset_of_files_with_a_table_of_captions(clips: list[bytes], served: HubServer, tmp_path: Path) -> None:
    table = b"file_name,text\n0.mp4,a ball\n1.mp4,a cube\n"
    files = {"train/0.mp4": clips[0], "train/1.mp4": clips[1], "train/metadata.csv": table}
    served.add("alice/clips", files, kind="datasets")
    hub = teacher("alice/clips", video="video", caption="text")
    assert np.array_equal(fetched(hub, asked("a cube"), tmp_path / "a"), noise(1))


def test_a_revision_is_pinned(clips: list[bytes], served: HubServer) -> None:
    first = served.add("alice/clips", {"train.parquet": parquet(["a ball"], clips[:1])}, kind="datasets")
    second = served.add("alice/clips", {"train.parquet": parquet(["a cube"], clips[1:2])}, kind="datasets")
    columns = {"video": "clip", "caption": "text"}
    old, new = teacher(f"alice/clips@{first}", **columns), teacher("alice/clips", **columns)
    assert (old.prompts(), new.prompts()) == (["a ball"], ["a cube"])
    assert (old.identity.settings["revision"], new.identity.settings["revision"]) == (first, second)


def test_a_row_that_changed_or_went_after_it_was_asked_for_is_asked_for_again(
    clips: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "tars" / "0.tar"
    tar(path, {"0.mp4": clips[0], "0.txt": b"a ball", "1.mp4": clips[1], "1.txt": b"a cube"})
    before = teacher(tmp_path / "tars", caption="txt")
    jobs = {caption: before.submit(asked(caption)) for caption in before.prompts()}
    tar(path, {"0.mp4": clips[2], "0.txt": b"a ball"})
    after = teacher(tmp_path / "tars", caption="txt")
    for caption, job in jobs.items():
        with pytest.raises(FailedError, match="has changed or gone"):
            after.fetch(job, asked(caption), tmp_path / "a")


def test_the_limit_takes_the_first_rows(clips: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.parquet").write_bytes(parquet(["a ball", "a cube"], clips[:2]))
    assert teacher(tmp_path / "files", video="clip", caption="text", limit=1).prompts() == ["a ball"]


def test_a_record_column_is_entered_by_a_dot() -> None:
    assert caption_in({"a": {"b": "a ball"}}, ["a", "b"]) == "a ball"
    assert caption_in(b'{"a": "{\\"b\\": \\"a ball\\"}"}', ["a", "b"]) == "a ball"
    assert caption_in("a ball", []) == "a ball"
    for value, keys, message in (
        ({"x": 1}, ["a"], "no 'a' in it; there is 'x'"),
        (b"\xff", [], "not readable"),
        ("{", ["a"], "not readable"),
        (f'{{"a": {"1" * 5000}}}', ["a"], "not readable"),
        ("3", ["a"], "no 'a' in it; there is no record"),
        (3, [], "int instead of text"),
        (None, [], "NoneType instead of text"),
    ):
        with pytest.raises(UserError, match=message):
            caption_in(value, keys)


def test_rows_without_captions_are_counted(
    clips: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "train.parquet").write_bytes(parquet(["a ball", None, " "], clips[:3]))
    assert teacher(tmp_path, video="clip", caption="text").prompts() == ["a ball"]
    assert "2 rows without a caption are left out" in caplog.text


def test_what_is_missing_is_named_with_what_is_there(clips: list[bytes], served: HubServer, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.parquet").write_bytes(parquet(["a ball"], clips[:1]))
    with pytest.raises(UserError, match=r"teacher\.video: .* has no column 'mp4'\. Columns: 'text', 'clip'"):
        teacher(tmp_path / "files")
    with pytest.raises(UserError, match=r"teacher\.caption: .* has no column 'json'\. Columns: 'text', 'clip'"):
        teacher(tmp_path / "files", video="clip")
    with pytest.raises(UserError, match=r"Unknown split \"test\""):
        teacher(tmp_path / "files", split="test")
    with pytest.raises(UserError, match=r"teacher\.dataset: alice/gone: no such repository"):
        teacher("alice/gone")
    with pytest.raises(UserError, match="is neither a folder here nor OWNER/NAME"):
        teacher("no/such/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: cannot be read: .*doesn't contain any data files"):
        teacher(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a ball")
    with pytest.raises(UserError, match="holds text files; arrow, parquet, videofolder, webdataset are read"):
        teacher(tmp_path / "texts")
    tar(tmp_path / "tars" / "0.tar", {"0.mp4": clips[0], "0.json": b'{"text": "a ball"}'})
    with pytest.raises(
        UserError, match=r"no row of .* has a caption in 'json\.prompt' \(no 'prompt' in it; there is 'text'\)"
    ):
        teacher(tmp_path / "tars")


def test_a_tar_that_is_cut_off_says_so(clips: list[bytes], tmp_path: Path) -> None:
    path = tar(tmp_path / "tars" / "0.tar", {"0.mp4": clips[0], "0.txt": b"a ball"})
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"teacher\.dataset: .*tars: cannot be read"):
        teacher(tmp_path / "tars", caption="txt")
