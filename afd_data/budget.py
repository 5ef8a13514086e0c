"""How much may still be asked for: what is charged, plus what is reserved for requests whose price is not known yet."""

from __future__ import annotations

import threading


class Budget:
    """A limit in the teacher's currency; None: none.  Thread-safe.

    spent: what was charged or reserved before.
    """

    def __init__(self, limit: float | None, spent: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self._lock = threading.Lock()

    def reserve(self, estimate: float) -> bool:
        """Set `estimate` aside, if it fits."""
        with self._lock:
            if self.limit is not None and self.spent + estimate > self.limit + 1e-9:
                return False
            self.spent += estimate
            return True

    def settle(self, estimate: float, charged: float) -> None:
        """Replace what was set aside for a request by what it cost."""
        with self._lock:
            self.spent += charged - estimate


class Streak:
    """Counts failures that follow one another; a success starts anew.  Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.last = ""
        self._count = 0
        self._lock = threading.Lock()

    @property
    def broken(self) -> bool:
        """Whether there were too many."""
        return self._count >= self.limit

    def failed(self, reason: str) -> None:
        """One more."""
        with self._lock:
            self._count, self.last = self._count + 1, reason

    def succeeded(self) -> None:
        """Something worked."""
        self._count = 0
