"""How far the student is behind the teacher on each prompt: what a trainer writes and a refresh reads.

One parquet file beside the training's checkpoints, a row a prompt in the order of their ids; complete or absent.
Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from afd_data.errors import UserError
from afd_data.files import atomic_write
from afd_data.sample import KEY

MARGINS = "margins.parquet"
MAX_ROWS = 10**7


@dataclass(frozen=True)
class Margin:
    """A prompt's running average of the discriminator's score of the teacher's video minus that of the student's.

    step: the last training step that drew the prompt; count: how many did; generation: of the teacher's video that
    was scored last.
    """

    prompt_id: str
    margin: float
    step: int
    count: int
    generation: int


def write_margins(path: Path, rows: Iterable[Margin]) -> None:
    """Replace the file durably; the same rows give the same bytes.  The folder must exist."""
    import pyarrow
    import pyarrow.parquet

    ordered = [asdict(row) for row in sorted(rows, key=lambda row: row.prompt_id)]
    with atomic_write(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ordered, _schema()), file)


def read_rows(path: Path) -> list[Margin]:
    """Everything that `write_margins` was given.

    Raises UserError when there is no such file, or afd did not write it.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.schema_arrow != _schema() or file.metadata.num_rows > MAX_ROWS:
                raise UserError(f"{path}: not a file of margins that `afd train` wrote; its columns are others.")
            table = file.read()
        table.validate(full=True)  # a stranger's text need not be UTF-8
    except FileNotFoundError:
        raise UserError(
            f"{path}: no margins. `afd train` with the objective afd writes them at every checkpoint; "
            "refresh.margins names another place."
        ) from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Remove it; the next checkpoint writes it anew.") from None
    rows = [Margin(**row) for row in table.to_pylist()]
    for row in rows:
        _check(row, path)
    if len({row.prompt_id for row in rows}) < len(rows):
        raise UserError(f"{path}: names a prompt twice, so afd did not write it.")
    return rows


def _check(row: Margin, path: Path) -> None:
    if None in astuple(row) or not math.isfinite(row.margin) or KEY.fullmatch(row.prompt_id) is None:
        raise UserError(f"{path}: {row} is not a margin that afd wrote. Remove the file.")


def _schema():
    import pyarrow

    kinds = {"str": pyarrow.string(), "float": pyarrow.float64(), "int": pyarrow.int64()}
    return pyarrow.schema([(field.name, kinds[str(field.type)]) for field in fields(Margin)])
