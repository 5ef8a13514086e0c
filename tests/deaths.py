"""Processes that die with -9: forks of this one, which cost no start of Python, killed at a step of their own."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

STEPS = ("fsync", "replace", "link", "rename", "unlink", "rmdir")  # of `os`; what a crash can fall between
KILLED = -signal.SIGKILL


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a child; returns its process id.  It ends with 0, or with 1 after a traceback."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Countdown:
    """Kills this process at its `left`-th step from now; never if it takes fewer."""

    def __init__(self, left: int) -> None:
        self.left = left
        for name in STEPS:
            setattr(os, name, self.counting(getattr(os, name)))

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, a call of which is a step too."""

        def step(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return step
