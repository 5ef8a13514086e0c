"""Teacher `folder`: videos on disk with captions, brought to what a recipe asks for (`clip` says how).

Several files with one caption are its takes in the order of their names.  The fingerprint of a request covers caption,
take and the rules of adaptation, not the file's bytes: those are hashed when the file is asked for (its sha256 is the
job id and stands in the provenance), and a file that changes between asking and fetching is asked for again.  A cache
therefore keeps what it took; give a replaced video another caption, or cache into a new folder.  A file that is added
to an old caption must sort behind the others: in front of them it would move their takes, so that one file is taken
twice and the new one not at all.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

from afd_data.acceptance import RejectedError
from afd_data.errors import UserError
from afd_data.files import file_sha256
from afd_data.prompt_sources import read_texts
from afd_data.prompts import normalise
from afd_data.teacher_config import FolderConfig
from afd_data.teachers import Delivery, FailedError, Free, Identity, RefusedError, Request
from afd_data.teachers.delivery import deliver

log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp", ".gif")
)


class Folder(Free):
    """See the module.  Raises UserError when the folder, its captions or the files they name are not in order."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config
        self.root = Path(config.path).expanduser()
        if not self.root.is_dir():
            raise UserError(f"teacher.path: no folder {self.root} (looked from {Path.cwd()})")
        self.files_by_caption = self._files_by_caption()
        self.identity = Identity(
            name="folder",
            version="1",
            settings={"fit": config.fit, "short": config.short, "start": config.start},
            licence=config.licence,
            distillation=config.distillation,
            terms_url=config.terms_url,
        )

    def prompts(self) -> list[str]:
        """The captions, without repetition."""
        return sorted(self.files_by_caption)

    def submit(self, request: Request) -> str:
        """The file's sha256.  Raises RefusedError where no file has this caption or the takes are used up."""
        return file_sha256(self.root / self._file(request))

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Write the clip as asked.  Raises RefusedError (unreadable, too short), FailedError (the file has changed)."""
        name = self._file(request)
        path = self.root / name
        if not path.is_file() or file_sha256(path) != job_id:
            raise FailedError(f"{name}: the file has changed since it was asked for")
        try:
            effective = deliver(path, target, request, self.config, name)
        except RejectedError as error:
            raise RefusedError(str(error)) from None
        return Delivery(effective, provenance={"file": name, "sha256": job_id})

    def _file(self, request: Request) -> str:
        files = self.files_by_caption.get(request.prompt, [])
        if not files:
            raise RefusedError(f"no video in {self.root} has this caption")
        if request.take >= len(files):
            raise RefusedError(f"only {len(files)} video(s) have this caption, take {request.take + 1} was asked for")
        return files[request.take]

    def _files_by_caption(self) -> dict[str, list[str]]:
        names = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.suffix.lower() in SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.root).parts)
        )
        if not names:
            raise UserError(f"teacher.path: no videos in {self.root} ({', '.join(sorted(SUFFIXES))})")
        table = self._caption_table()
        captions = self._sidecars(names) if table is None else self._from_table(table)
        without = [name for name in names if name not in captions]
        if without:
            log.warning("%s: %d of %d videos have no caption and are left out", self.root, len(without), len(names))
        if not captions:
            raise UserError(
                f"{self.root}: no captions. Write captions.csv (columns file,caption), captions.jsonl, "
                f"or a text file beside each video, for example {PurePosixPath(names[0]).with_suffix('.txt')}"
            )
        files = defaultdict(list)
        for name in sorted(captions):
            files[captions[name]].append(name)
        return dict(files)

    def _caption_table(self) -> Path | None:
        if self.config.captions is None:
            return next((self.root / n for n in ("captions.csv", "captions.jsonl") if (self.root / n).is_file()), None)
        for path in (self.root / self.config.captions, Path(self.config.captions)):
            if path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
                return path
        raise UserError(
            f"teacher.captions: no csv or jsonl file {self.config.captions} in {self.root} nor in {Path.cwd()}"
        )

    def _from_table(self, table: Path) -> dict[str, str]:
        """Caption of each file.  Raises UserError listing what is absent, named twice or outside the folder."""
        columns = [read_texts(str(table.resolve()), column, table.parent) for column in ("file", "caption")]
        rows = list(zip(*columns, strict=True))
        problems = [
            f"{where}: {name!r} {problem}" for (name, where), _ in rows if (problem := self._problem(name)) is not None
        ]
        counts = Counter(PurePosixPath(name).as_posix() for (name, _), _ in rows)
        problems += [f"{table}: {name!r} stands there {count} times" for name, count in counts.items() if count > 1]
        if problems:
            more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise UserError("captions that do not fit the folder:\n  " + "\n  ".join(problems[:10]) + more)
        return {PurePosixPath(name).as_posix(): normalise(caption, where) for (name, _), (caption, where) in rows}

    def _problem(self, name: str) -> str | None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            return "leads out of the folder; names are relative, with / between folders"
        if not (self.root / path).is_file():
            return f"is not in {self.root}"
        return None if path.suffix.lower() in SUFFIXES else "is not a video"

    def _sidecars(self, names: list[str]) -> dict[str, str]:
        captions = {}
        for name in names:
            sidecar = (self.root / name).with_suffix(".txt")
            if sidecar.is_file():
                try:
                    captions[name] = normalise(sidecar.read_text(encoding="utf-8-sig"), str(sidecar))
                except UnicodeDecodeError as error:
                    raise UserError(f"{sidecar}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
        return captions
