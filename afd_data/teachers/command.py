"""Teacher `command`: any program that turns a prompt into a video file.

It is run without a shell, in the folder and with the environment of `afd`, with its placeholders filled in and the
prompt in UTF-8 on its standard input.  It writes a video to {output} (a new path that ends in .mp4; any container is
read) and says how it went with its exit code.  A prompt may begin with a dash: give it to a program that reads options
as --prompt={prompt}, or on standard input only.

| exit code | meaning |
|---|---|
| 0 | the video is there |
| 65 (EX_DATAERR) | it will not make this video: never asked again by itself |
| 75 (EX_TEMPFAIL), any other | it failed: the next run asks again |

The last lines of its standard error become the reason in the journal, without the values of environment variables that
are named like secrets; its standard output is dropped.  `argv` becomes part of the cache: secrets belong into the
environment.  A run that takes longer than `timeout_s` is killed together with all that it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import string
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import IO

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.teacher_config import CommandConfig
from afd_data.teachers import Delivery, FailedError, Free, Identity, RefusedError, Request, programs
from afd_data.teachers.delivery import deliver

REFUSES = os.EX_DATAERR
SHOWN_LINES, SHOWN = 3, 1000  # lines and characters of standard error
READ_BYTES = 2**16  # of its end
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASS", "AUTH", "CREDENTIAL")
PLACEHOLDERS = ("prompt", "seed", "take", "output", "width", "height", "frames", "fps")
SHORTEST_SECRET = 6  # characters; shorter values occur in texts by chance


class Command(Free):
    """See the module.  Raises UserError: no such program, an unknown placeholder, no {output}."""

    def __init__(self, config: CommandConfig) -> None:
        self.config = config
        _check_placeholders(config.argv)
        if shutil.which(config.argv[0]) is None:
            raise UserError(f"teacher.argv: no program {config.argv[0]!r} that can be run (looked from {Path.cwd()})")
        rules = config.model_dump(include={"fit", "short", "start"})
        self.identity = Identity(
            name="command",
            version=config.version,
            settings={"argv": list(config.argv), **rules},
            licence=config.licence,
            distillation=config.distillation,
            terms_url=config.terms_url,
        )

    def prompts(self) -> list[str]:
        """None of its own."""
        return []

    def submit(self, request: Request) -> str:
        """Takes everything."""
        return request.fingerprint

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Run the program and take its video.

        Raises RefusedError (exit code 65), FailedError (any other, too long, no file), RejectedError (no video, or too
        short), UserError (it cannot be run).
        """
        # In the spool, where a leftover is swept up; new for each run, as a killed run's program may still write.
        output = target.with_name(f"{target.stem}-{uuid.uuid4().hex}.mp4")
        try:
            self._run([part.format(**placeholders(request, output)) for part in self.config.argv], request.prompt)
            if not output.is_file() or output.stat().st_size == 0:
                raise FailedError("the program ended well and wrote no video to {output}")
            effective = deliver(output, target, request, self.config, "the program's video")
        finally:
            output.unlink(missing_ok=True)
        return Delivery(effective, provenance={"program": Path(self.config.argv[0]).name, "seed": request.seed})

    def _run(self, argv: list[str], prompt: str) -> None:
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
                )
            except OSError as error:
                raise UserError(f"teacher.argv: {argv[0]} cannot be run ({error.strerror})") from None
            try:
                with programs.watched(process):
                    process.communicate(prompt.encode(), timeout=self.config.timeout_s)
            except BaseException as error:
                programs.kill(process.pid)
                process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise FailedError(f"killed after {self.config.timeout_s:g} s{_last_lines(said)}") from None
                raise
            if process.returncode == REFUSES:
                raise RefusedError(f"the program refuses{_last_lines(said)}")
            if process.returncode != 0:
                raise FailedError(f"{_ending(process.returncode)}{_last_lines(said)}")


def placeholders(request: Request, output: Path) -> dict[str, str | int | float]:
    """What can be filled in."""
    video = request.video
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "take": request.take,
        "output": str(output.absolute()),
        "width": video.width,
        "height": video.height,
        "frames": video.frames,
        "fps": int(video.fps) if video.fps.is_integer() else video.fps,
    }


def _check_placeholders(argv: tuple[str, ...]) -> None:
    hint = f"There are {', '.join(PLACEHOLDERS)}; a brace that is meant as such is written twice."
    try:
        found = {name for part in argv for _, name, _, _ in string.Formatter().parse(part) if name is not None}
        if unknown := sorted(found - set(PLACEHOLDERS)):
            raise UserError(f"teacher.argv: unknown placeholder {{{unknown[0]}}}. {hint}")
        for part in argv:
            part.format(**placeholders(Request("", "", "", 0, 0, VideoConfig()), Path()))
    except (ValueError, LookupError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"teacher.argv: {error}. {hint}") from None
    if "output" not in found:
        raise UserError("teacher.argv: {output} does not occur in it, so the program cannot know where to write")


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def _last_lines(said: IO[bytes]) -> str:
    """ ": " and the end of standard error, or nothing."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - READ_BYTES))
    text = said.read().decode(errors="replace")
    for name, value in os.environ.items():
        if any(word in name.upper() for word in SECRET_NAMES) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, "***")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {' / '.join(lines[-SHOWN_LINES:])[-SHOWN:]}" if lines else ""
