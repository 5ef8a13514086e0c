"""What a user can mend ends in one message and exit code 2; only our own mistakes are tracebacks."""

from __future__ import annotations

import sys
import traceback
from typing import IO, Any

import click

from afd_data.errors import UserError
from afd_data.files import NO_ROOM


class Mistake(click.ClickException):
    """One message on stderr; 2: the user's to mend."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.format_message()}", file=file or sys.stderr)


class Interrupted(click.ClickException):
    """Ctrl-C, with the shell's code for it."""

    exit_code = 130

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"\n{self.format_message()}", file=file or sys.stderr)


class MistakesGroup(click.Group):
    """A group whose commands may raise UserError or OSError for what the user gave."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say_origin(ctx)
            raise Mistake(str(error)) from error
        except OSError as error:
            # With a file name it is about a path that the user gave or chose; a broken pipe is click's business.
            if error.filename is None and error.errno not in NO_ROOM:
                raise
            _say_origin(ctx)
            where = f"{error.filename}: " if error.filename is not None else ""
            raise Mistake(f"{where}{error.strerror or error}") from error
        except KeyboardInterrupt:
            raise Interrupted("Interrupted. What is finished is kept: run the same command again to go on.") from None


def _say_origin(ctx: click.Context) -> None:
    """With -v, also say which line raised."""
    if ctx.params.get("verbose"):
        click.echo(traceback.format_exc(), err=True)
