"""Teacher `hub`: a video dataset with captions, on the Hub or in a folder of tars (WebDataset) or parquet files.

`datasets` downloads the whole dataset and makes its memory-mapped table of it in its cache, once; rows are then read
one by one.  A revision on the Hub is pinned to its commit, which is part of every fingerprint: name @REVISION if the
dataset may move on.  Captions are the prompts; several rows with one caption are its takes, in the order of the rows.
The job id is the row's number and the sha256 of its video, so that a row that has gone or changed is noticed.

Everything in a dataset is a stranger's.  Members of tars are taken as bytes and never decoded by their names; of a
video column only bytes count, or files that the dataset itself brought along; nothing is unpickled and no script run.
A row without a caption is left out, one without a whole video is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from tarfile import TarError
from typing import TYPE_CHECKING, Any, cast

from afd_data.acceptance import RejectedError
from afd_data.errors import UserError
from afd_data.hub import checked_name, explained_reading, short
from afd_data.prompts import normalise
from afd_data.teacher_config import HubConfig
from afd_data.teachers import Delivery, FailedError, Free, Identity, RefusedError, Request
from afd_data.teachers.delivery import deliver

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

KINDS = ("arrow", "parquet", "videofolder", "webdataset")  # of files; others can hold no videos, or not safely
COMMIT = re.compile("[0-9a-f]{40}")
PAGE = 1000  # captions read at once
WRITE_ROWS = 16  # rows of whole videos that are in memory while the table is made


class Hub(Free):
    """See the module.  Raises UserError: no such dataset, configuration, split or column, or no captions in it."""

    def __init__(self, config: HubConfig) -> None:
        self.config = config
        self._folder = Path(config.dataset).expanduser()
        self._facts: dict[str, str] = {"dataset": self._folder.resolve().name}
        if not self._folder.is_dir():
            name, _, revision = config.dataset.partition("@")
            self._facts = {"dataset": name, "revision": _commit(name, revision or None)}
        self._rows = _opened(config, self._facts)
        self._where = f"{config.dataset}, {config.split}"
        self._rows_by_caption = self._read_captions()
        rules = config.model_dump(include={"config", "split", "video", "fit", "short", "start"})
        self.identity = Identity(
            name="hub",
            version="1",
            settings={**self._facts, **rules},
            licence=config.licence,
            distillation=config.distillation,
            terms_url=config.terms_url,
        )

    def prompts(self) -> list[str]:
        """The captions, without repetition."""
        return sorted(self._rows_by_caption)

    def submit(self, request: Request) -> str:
        """The row and its video's sha256.

        Raises RefusedError where no row has this caption, the takes are used up, or the row has no video.
        """
        rows = self._rows_by_caption.get(request.prompt, [])
        if not rows:
            raise RefusedError(f"no row of {self._where} has this caption")
        if request.take >= len(rows):
            raise RefusedError(f"only {len(rows)} row(s) have this caption, take {request.take + 1} was asked for")
        row = rows[request.take]
        return f"{row}-{hashlib.sha256(self._video(row)).hexdigest()}"

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Write the row's video as asked.  Raises RefusedError (unreadable, too short), FailedError (row changed)."""
        number, _, sha256 = job_id.partition("-")
        row, name = int(number), f"row {number}"
        data = self._video(row) if row < len(self._rows) else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise FailedError(f"{name} of {self._where} has changed or gone since it was asked for")
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f"{target.stem}-", suffix=".mp4") as source:
            source.write(data)
            source.flush()
            try:
                effective = deliver(Path(source.name), target, request, self.config, name)
            except RejectedError as error:
                raise RefusedError(str(error)) from None
        place = {"config": self.config.config, "split": self.config.split, "row": row, "sha256": sha256}
        return Delivery(effective, provenance={**self._facts, **place})

    def _video(self, row: int) -> bytes:
        value = self._column(self.config.video, row, row + 1)[0]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and isinstance(path, str) and self._brought_along(path):
            data = Path(path).read_bytes()
        if not isinstance(data, bytes) or not data:
            raise RefusedError(f"row {row} of {self._where} has no video in {self.config.video!r}")
        return data

    def _brought_along(self, path: str) -> bool:
        """Whether a file is of this dataset: a row could name any file of this machine."""
        from huggingface_hub import constants

        name = self._facts["dataset"].replace("/", "--")
        files = Path(constants.HF_HUB_CACHE) / f"datasets--{name}" if "revision" in self._facts else self._folder
        try:
            real = Path(path).resolve()
            return real.is_file() and real.is_relative_to(files.resolve())
        except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
            return False

    def _column(self, name: str, first: int, last: int) -> list[Any]:
        """Values of rows [first, last), as arrow has them: nothing is decoded."""
        table = cast("pyarrow.Table", self._rows.select_columns([name]).with_format("arrow")[first:last])
        return table.column(name).to_pylist()

    def _read_captions(self) -> dict[str, list[int]]:
        column, *keys = self.config.caption.split(".")
        for option, name in (("video", self.config.video), ("caption", column)):
            if name not in self._rows.column_names:
                raise UserError(
                    f"teacher.{option}: {self._where} has no column {name!r}. Columns: "
                    f"{', '.join(map(repr, self._rows.column_names))}. Name one of these."
                )
        found, without, example = defaultdict(list), 0, ""
        for first in range(0, len(self._rows), PAGE):
            for row, value in enumerate(self._column(column, first, min(first + PAGE, len(self._rows))), first):
                try:
                    found[normalise(caption_in(value, keys), f"row {row}")].append(row)
                except UserError as error:
                    without, example = without + 1, example or str(error)
        if not found:
            raise UserError(
                f"teacher.caption: no row of {self._where} has a caption in {self.config.caption!r} ({example})"
            )
        if without:
            log.warning("%s: %d rows without a caption are left out (%s)", self._where, without, example)
        return dict(found)


def caption_in(value: object, keys: list[str]) -> str:
    """The text in a column's value, a record's field where `keys` name one; bytes are UTF-8, records may be JSON.

    Raises UserError saying what is there instead.
    """
    try:
        text = value.decode() if isinstance(value, bytes) else value
        for key in keys:
            record = json.loads(text) if isinstance(text, str) else text
            if not isinstance(record, dict) or key not in record:
                there = ", ".join(map(repr, record)) if isinstance(record, dict) else "no record"
                raise UserError(f"no {key!r} in it; there is {there}")
            text = record[key]
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise UserError(f"not readable: {short(error)}") from None
    if not isinstance(text, str):
        raise UserError(f"{type(text).__name__} instead of text")
    return text


def _commit(name: str, revision: str | None) -> str:
    """What a revision of a dataset means now.  Raises UserError."""
    from huggingface_hub import HfApi

    where = f"teacher.dataset: {name}"
    try:
        checked_name(name)
    except UserError:
        raise UserError(f"{where!r} is neither a folder here nor OWNER/NAME[@REVISION]") from None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    with explained_reading(where, revision):
        sha = HfApi().dataset_info(name, revision=revision).sha
    assert sha is not None
    return sha


def _opened(config: HubConfig, facts: dict[str, str]) -> datasets.Dataset:
    """The split as a table of bytes and texts.  Raises UserError."""
    import datasets.config
    from datasets.exceptions import DatasetsError

    revision = facts.get("revision")
    path = str(Path(config.dataset).expanduser()) if revision is None else facts["dataset"]
    # Apart from what others make of the same dataset, since ours are not decoded.
    home = Path(datasets.config.HF_DATASETS_CACHE) / "afd"
    where = f"teacher.dataset: {config.dataset}"
    try:
        with explained_reading(where, revision) if revision else nullcontext():
            builder = datasets.load_dataset_builder(
                path, config.config, revision=revision, cache_dir=str(home), writer_batch_size=WRITE_ROWS
            )
            kind = type(builder).__module__.rpartition(".")[2]
            if kind not in KINDS:
                raise UserError(f"{where}: holds {kind} files; {', '.join(KINDS)} are read")
            if kind == "webdataset":
                _leave_as_bytes(builder)
            builder.download_and_prepare(verification_mode="no_checks")
            rows = builder.as_dataset(split=config.split)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, TarError, DatasetsError) as error:
        cause = f" ({short(error.__cause__)})" if error.__cause__ else ""
        raise UserError(f"{where}: cannot be read: {short(error)}{cause}") from error
    assert isinstance(rows, datasets.Dataset)
    return rows if config.limit is None else rows.select(range(min(config.limit, len(rows))))


def _leave_as_bytes(builder: datasets.DatasetBuilder) -> None:
    """Members would be parsed by their names, some of them by torch.load, and one that is odd would end it all."""
    kind = type(builder)
    raw = {
        "DECODERS": {},
        "IMAGE_EXTENSIONS": [],
        "AUDIO_EXTENSIONS": [],
        "VIDEO_EXTENSIONS": [],
        "MESH_EXTENSIONS": [],
    }
    builder.__class__ = type(kind.__name__, (kind,), {**raw, "__module__": kind.__module__})
    builder.info.features = None
