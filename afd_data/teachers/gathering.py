"""Single items of many threads -> batches, worked on one at a time by one of the threads that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOMENT_S = 0.25  # how long a batch that is not full waits for one more item


class Gatherer(Generic[Item, Result]):
    """`work` takes up to `size` items, in the order in which they came, and returns a result for each."""

    def __init__(self, size: int, work: Callable[[list[Item]], list[Result]], moment_s: float = MOMENT_S) -> None:
        self._size = size
        self._work = work
        self._moment_s = moment_s
        self._waiting: list[tuple[Item, Future[Result]]] = []
        self._arrival = threading.Condition()
        self._working = threading.Lock()

    def do(self, item: Item) -> Result:
        """The item's result, worked out in a batch with others.  What `work` raises, all of its batch raise."""
        mine: Future[Result] = Future()
        with self._arrival:
            self._waiting.append((item, mine))
            self._arrival.notify()
        while not mine.done():
            with self._working:  # whoever comes in leads the next batch, which need not be its own
                if not mine.done():
                    self._work_on(self._gathered())
        return mine.result()

    def _gathered(self) -> list[tuple[Item, Future[Result]]]:
        with self._arrival:
            until = time.monotonic() + self._moment_s
            while (count := len(self._waiting)) < self._size and (left_s := until - time.monotonic()) > 0:
                self._arrival.wait(left_s)
                if len(self._waiting) > count:
                    until = time.monotonic() + self._moment_s
            batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            return batch

    def _work_on(self, batch: list[tuple[Item, Future[Result]]]) -> None:
        try:
            results = self._work([item for item, _ in batch])
            assert len(results) == len(batch)
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
