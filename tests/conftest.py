"""What all tests share: the command `afd` in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result


@pytest.fixture(scope="session")
def afd() -> Callable[..., Result]:
    """`afd("train", "my.yaml")` -> click's Result: exit_code, stdout, stderr, exception."""
    # `cli/` is called `afd_cli` once it is installed; type checkers cannot follow that.
    main = importlib.import_module("afd_cli").main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="afd")

    return run
