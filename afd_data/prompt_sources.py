"""Where prompts are read from: txt, csv, jsonl, parquet, a Hub dataset, a teacher's captions -> (text, its place).

Texts come as they are; `afd_data.prompts` normalises and splits them.  Every error names file, line and column.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from afd_data.errors import UserError

if TYPE_CHECKING:
    from afd_data.teachers import Teacher

HUB = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<split>[\w.-]+))?")


def read_texts(source: str, column: str, base: Path, teacher: Teacher | None = None) -> Iterator[tuple[str, str]]:
    """(text, where it stands) of every prompt; paths are tried from `base`, then from the current folder.

    Raises UserError: no such file, dataset or column, a line that cannot be read.
    """
    if source == "teacher":
        assert teacher is not None, "prompts.source: teacher needs the teacher"
        yield from ((text, f"caption {number}") for number, text in enumerate(teacher.prompts(), 1))
        return
    if source.startswith("hf://"):
        yield from _hub(source, column)
        return
    path = _located(source, base)
    readers = {".txt": _txt, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"prompts: {path}: unknown kind of file; use {', '.join(readers)}")
    try:
        yield from readers[path.suffix.lower()](path, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None


def _located(source: str, base: Path) -> Path:
    for path in (base / source, Path(source)):
        if path.is_file():
            return path
    folder = (base / source).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    raise UserError(f"prompts: no file {source} in {base} nor in {Path.cwd()}.{_nearest(Path(source).name, names)}")


def _nearest(name: str, names: Iterable[object]) -> str:
    """A hint, or nothing."""
    close = difflib.get_close_matches(name, [str(other) for other in names], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(other) for other in close)}?" if close else ""


def _no_column(where: str, column: str, names: Iterable[object]) -> UserError:
    names = [str(name) for name in names]
    there = ", ".join(repr(name) for name in names[:20]) or "none"
    return UserError(f"{where}: no column {column!r}.{_nearest(column, names)} Columns: {there}. Name one of these.")


def _txt(path: Path, _column: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and not line.lstrip().startswith("#"):
                yield line, f"{path}:{number}"


def _csv(path: Path, column: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            if column not in (rows.fieldnames or []):
                raise _no_column(f"{path}:1", column, rows.fieldnames or [])
            for row in rows:
                yield row[column] or "", f"{path}:{rows.line_num}: column {column!r}"
        except csv.Error as error:
            raise UserError(f"{path}:{rows.line_num}: not a csv line ({error})") from None


def _jsonl(path: Path, column: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: not JSON, an integer of 5000 digits
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            yield _field(record, column, f"{path}:{number}"), f"{path}:{number}: key {column!r}"


def _parquet(path: Path, column: str) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise _no_column(str(path), column, file.schema_arrow.names)
        texts = file.read(columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({str(error).splitlines()[0]})") from None
    for number, text in enumerate(texts, 1):
        yield _field({column: text}, column, f"{path}: row {number}"), f"{path}: row {number}"


def _hub(source: str, column: str) -> Iterator[tuple[str, str]]:
    match = HUB.fullmatch(source)
    if not match:
        raise UserError(f"prompts: {source!r}: expected hf://datasets/OWNER/NAME[@REVISION][/SPLIT]")
    import datasets

    try:
        split = match["split"] or "train"
        rows = datasets.load_dataset(match["name"], revision=match["revision"], split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield _field(row, column, f"{source}: row {number}"), f"{source}: row {number}"
    except UserError:
        raise
    except (OSError, ValueError) as error:  # what `datasets` and the Hub's client raise: all derive from these
        raise UserError(f"prompts: {source} cannot be read: {error}") from None


def _field(record: object, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        raise _no_column(where, column, record if isinstance(record, dict) else [])
    if not isinstance(record[column], str):
        raise UserError(f"{where}: {column} is {type(record[column]).__name__}, expected text")
    return record[column]
