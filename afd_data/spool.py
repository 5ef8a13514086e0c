"""The spool: finished videos that are not in a shard yet, each durable on its own.

`spool/gGGGG-KEY.mp4` and `.json` lie there complete or not at all; the JSON comes last, so a sample counts as spooled
when its JSON is there.  A *bare* mp4 is one whose run died before that.  `*.part.mp4` is where a teacher writes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import PART, atomic_write, file_sha256, fsync
from afd_data.plan import Planned
from afd_data.sample import Sample, parse_sample
from afd_data.shards import Content

DRAFT = ".part.mp4"
DOWNLOAD = ".download"  # what a teacher got, beside its `*.part.mp4`, before it is brought to what was asked for


class Spool:
    """The folder `spool` of a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, planned: Planned, ending: str) -> Path:
        """Where a file of a sample lies; ending: `mp4`, `json` or `part.mp4`."""
        return self.folder / f"g{planned.generation:04d}-{planned.key}.{ending}"

    def keep(self, planned: Planned, sample: Sample) -> float:
        """Make the draft durable under its final name, with its JSON; return the time, in seconds since 1970."""
        draft, mp4 = self.path(planned, "part.mp4"), self.path(planned, "mp4")
        fsync(draft)
        os.replace(draft, mp4)
        with atomic_write(self.path(planned, "json")) as file:  # its fsync of the folder covers both names
            file.write(sample.to_json())
        return mp4.stat().st_mtime

    def find(self, planned: Planned) -> Sample | None:
        """The sample, if it lies here complete and undamaged and answers this very request."""
        json_path, mp4_path = self.path(planned, "json"), self.path(planned, "mp4")
        try:
            sample = parse_sample(json_path.read_bytes(), str(json_path))
            whole = sample.fingerprint == planned.fingerprint and sample.video_sha256 == file_sha256(mp4_path)
        except (FileNotFoundError, UserError):
            return None
        return sample if whole else None

    def read(self, planned: Planned, created_at: float) -> Content:
        """The bytes to seal.  Raises UserError when the files are gone or have changed since they were spooled."""
        mp4_path, json_path = self.path(planned, "mp4"), self.path(planned, "json")
        try:
            mp4, record = mp4_path.read_bytes(), json_path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: was spooled and is gone. Put it back, or {START_AGAIN}") from None
        if parse_sample(record, str(json_path)).video_sha256 != hashlib.sha256(mp4).hexdigest():
            raise UserError(f"{mp4_path}: changed since it was spooled; the disk or somebody damaged it. {START_AGAIN}")
        return Content(planned.key, created_at, mp4, record)

    def size(self, planned: Planned) -> int:
        """Bytes of both members."""
        return sum(self.path(planned, ending).stat().st_size for ending in ("mp4", "json"))

    def names(self) -> list[tuple[int, str]]:
        """(generation, key) of everything that lies here complete."""
        return [_name(path) for path in sorted(self.folder.glob("g????-*.json"))]

    def bare(self) -> list[tuple[int, str]]:
        """(generation, key) of every complete video without its JSON."""
        found = (path for path in sorted(self.folder.glob("g????-*.mp4")) if not path.name.endswith(DRAFT))
        return [_name(path) for path in found if not path.with_suffix(".json").exists()]

    def drop(self, name: tuple[int, str]) -> None:
        """Remove whatever lies here of a sample; name: (generation, key)."""
        generation, key = name
        for ending in ("part.mp4", "json.part", "mp4", "json"):  # the JSON last, so that a crash leaves the name known
            (self.folder / f"g{generation:04d}-{key}.{ending}").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith((DRAFT, PART, DOWNLOAD)):
                path.unlink()


def _name(path: Path) -> tuple[int, str]:
    return int(path.stem[1:5]), path.stem[6:]


START_AGAIN = "Remove the cache and run again, or cache into another folder with --set out=FOLDER."
