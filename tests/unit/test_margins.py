"""Margins: the file that a refresh reads, and the running averages that a trainer keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from afd_data.config import StreamConfig
from afd_data.errors import UserError
from afd_data.examples import Example
from afd_data.margins import Margin, read_rows, write_margins
from afd_data.stream import Stream
from afd_train.config import TrainConfig
from afd_train.margins import Margins
from afd_train.parallel import Processes, open_accelerator

ROWS = [Margin("b", 0.5, 7, 2, 1), Margin("a", -1.25, 3, 1, 0)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "margins.parquet"
    write_margins(path, ROWS)
    assert read_rows(path) == ROWS[::-1]
    assert pyarrow.parquet.read_table(path).schema.names == ["prompt_id", "margin", "step", "count", "generation"]


def test_the_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    write_margins(tmp_path / "one", ROWS)
    write_margins(tmp_path / "two", ROWS[::-1])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_prompts_are_a_file_too(tmp_path: Path) -> None:
    write_margins(tmp_path / "none", [])
    assert read_rows(tmp_path / "none") == []


def test_a_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no margins\. `afd train` with the objective afd writes them"):
        read_rows(tmp_path / "margins.parquet")


@pytest.mark.parametrize("kind", ["text", "cut", "columns", "empty cell", "not finite", "twice", "hostile id"])
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "margins.parquet"
    write_margins(path, ROWS)
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    match kind:
        case "text":
            path.write_text("not parquet")
        case "cut":
            path.write_bytes(path.read_bytes()[:-20])
        case "columns":
            pyarrow.parquet.write_table(table.drop_columns(["step"]), path)
        case _:
            change = {
                "empty cell": {"margin": None},
                "not finite": {"margin": math.nan},
                "twice": {"prompt_id": "b"},
                "hostile id": {"prompt_id": "../a"},
            }[kind]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([rows[0] | change, rows[1]], table.schema), path)
    with pytest.raises(UserError, match=r"margins\.parquet: "):
        read_rows(path)


ONE = Processes(open_accelerator(), TrainConfig())  # process


@pytest.fixture
def drawn(playground_cache: Path) -> Callable[..., Example]:
    """`drawn("a", generation=1)` -> an example of that prompt."""
    (example,) = Stream(playground_cache, StreamConfig(), "train", 0).next_batch(1)
    return lambda prompt_id, generation=0: replace(example, prompt_id=prompt_id, generation=generation)


def test_a_prompts_margin_is_halfway_to_the_latest_one(drawn) -> None:
    margins = Margins()
    margins.add([drawn("a"), drawn("b")], torch.tensor([1.0, 2.0]), 0, ONE)
    margins.add([drawn("a", 1)], torch.tensor([3.0]), 5, ONE)
    margins.add([drawn("a", 1)], torch.tensor([0.0]), 6, ONE)
    assert margins.rows() == [Margin("a", 1.0, 6, 3, 1), Margin("b", 2.0, 0, 1, 0)]  # ((1 + 3) / 2 + 0) / 2


def test_averages_go_through_a_checkpoint_without_losing_a_bit(drawn) -> None:
    margins, resumed = Margins(), Margins()
    margins.add([drawn("a"), drawn("b")], torch.tensor([1 / 3, -2e-30]), 0, ONE)
    resumed.load_state_dict(json.loads(json.dumps(margins.state_dict())))
    assert resumed.rows() == margins.rows()


def test_where_nothing_was_measured_no_file_is_written(tmp_path: Path) -> None:
    Margins().write(tmp_path / "margins.parquet")
    assert not (tmp_path / "margins.parquet").exists()
