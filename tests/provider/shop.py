"""Jobs of the fake provider and what goes wrong with them: `mode=NAME` in a prompt says what.

| mode | what happens |
|---|---|
| ok | ready at the second poll |
| slow | ready a second after the order |
| 429 | the first two orders are answered 429 with Retry-After: 0, and not taken |
| 500-after-accept | the first order is taken and answered 500 |
| drop-after-accept | the first order is taken, and the connection closed without an answer |
| timeout-after-accept | the first order is taken, and answered 3 s later |
| drop-before-accept | the connection of the first order is closed, and nothing taken |
| refuse | 400 (fal: 422, OpenRouter: 403) with the service's moderation error; nothing taken |
| refuse-late | the job ends failed with a moderation code |
| fail | the job fails, not billed |
| fail-after-billing | the job fails and is billed |
| expired | the first address of the video has expired: 403; asking the job again gives a good one |
| gone | no address of the video works: 404 |
| truncated | the first download ends in the middle, with the full Content-Length |
| truncated-silently | the same, without a Content-Length |
| html | the first download is an HTML page with status 200 |
| forgets | from the second poll on the job is unknown: 404 |
| flaky | the first GET of every address is a 500 |

"The first order" is that of one account: a token where the service has one, else service, prompt and seed.  Orders
after it are taken as usual, so double orders are counted and not prevented.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from afd_data.config import VideoConfig
from tests.provider.footage import Footage
from tests.provider.wire import Answer, Question

Phase = Literal["queued", "running", "ready", "failed", "refused", "cancelled"]
Kind = Literal["key", "busy", "broken", "refused", "lost", "invalid"]
SLOW_S, HELD_S = 1.0, 3.0
LONGEST_PAGE = 500
MODE = re.compile(r"mode=([a-z0-9-]+)")


class Trouble(Exception):
    """A request that a service answers with its error of this kind."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind: Kind = kind


class Dropped(Exception):
    """A request whose connection closes without an answer."""


@dataclass(frozen=True)
class Service:
    """A protocol: how it answers, and how it words its errors."""

    answer: Callable[[Shop, Question], Answer]
    errors: dict[Kind, Answer]


@dataclass(frozen=True)
class Order:
    """What somebody asks for.  `fields` is the request as it came; token: what the service echoes, "" if nothing."""

    service: str
    prompt: str
    seed: int
    fields: dict[str, Any]
    token: str = ""

    @property
    def account(self) -> str:
        """Under which accepted jobs are counted."""
        return self.token or f"{self.service}|{self.prompt}|{self.seed}"

    @property
    def mode(self) -> str:
        found = MODE.search(self.prompt)
        return found[1] if found else "ok"


@dataclass
class Job:
    """An accepted order."""

    order: Order
    id: str
    created_at: float
    polls: int = 0
    addresses: int = 0  # handed out for its video
    downloads: int = 0  # begun
    cancelled: bool = False

    @property
    def phase(self) -> Phase:
        """How it stands at its present number of polls."""
        if self.cancelled:
            return "cancelled"
        age = time.time() - self.created_at
        if self.order.mode == "slow" and age < SLOW_S:
            return "queued" if age < SLOW_S / 2 else "running"
        if self.polls < 2 and self.order.mode != "slow":
            return "running"
        ends: dict[str, Phase] = {"refuse-late": "refused", "fail": "failed", "fail-after-billing": "failed"}
        return ends.get(self.order.mode, "ready")

    @property
    def billed(self) -> bool:
        return self.phase == "ready" or (self.phase == "failed" and self.order.mode == "fail-after-billing")


@dataclass
class Shop:
    """All jobs of all services.  Thread-safe."""

    footage: Footage
    lock: threading.RLock = field(default_factory=threading.RLock)
    jobs: dict[str, Job] = field(default_factory=dict)
    accepted: Counter[str] = field(default_factory=Counter)
    orders: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)  # addresses of flaky jobs
    requests: list[dict[str, Any]] = field(default_factory=list)
    longest_page: int = LONGEST_PAGE  # of a list of jobs, whatever is asked for

    def reset(self) -> None:
        """Forget jobs, counts and requests."""
        with self.lock:
            for memory in (self.jobs, self.accepted, self.orders, self.seen, self.requests):
                memory.clear()
            self.longest_page = LONGEST_PAGE

    def take(self, order: Order, prefix: str = "") -> Job:
        """Accept an order.  Raises Trouble, Dropped."""
        if not order.prompt:
            raise Trouble("invalid")
        with self.lock:
            self.orders[order.account] += 1
            number = self.orders[order.account]
            if order.mode == "refuse":
                raise Trouble("refused")
            if order.mode == "429" and number <= 2:
                raise Trouble("busy")
            if order.mode == "drop-before-accept" and number == 1:
                raise Dropped
            job = Job(order, f"{prefix}{secrets.token_hex(12)}", time.time())
            self.jobs[job.id] = job
            self.accepted[order.account] += 1
        if number == 1:
            _lose_the_answer(order.mode)
        return job

    def find(self, service: str, job_id: str, path: str, polled: bool = False) -> Job:
        """A job that somebody asks for at `path`; `polled`: how it stands.  Raises Trouble."""
        with self.lock:
            job = self.jobs.get(job_id)
            if job is None or job.order.service != service:
                raise Trouble("lost")
            self.stumble(job, path)
            job.polls += polled
            if job.order.mode == "forgets" and job.polls >= 2:
                raise Trouble("lost")
            return job

    def of(self, service: str) -> list[Job]:
        """The jobs of a service, newest first."""
        with self.lock:
            jobs = [job for job in self.jobs.values() if job.order.service == service]
            return [job for job in jobs if not (job.order.mode == "forgets" and job.polls >= 2)][::-1]

    def stumble(self, job: Job, path: str) -> None:
        """Raises Trouble at the first GET of every address of a flaky job."""
        with self.lock:
            if job.order.mode == "flaky" and path not in self.seen:
                self.seen.add(path)
                raise Trouble("broken")

    def state(self) -> dict[str, Any]:
        """What happened so far."""
        with self.lock:
            jobs = [
                {"id": job.id, "service": job.order.service, "prompt": job.order.prompt, "seed": job.order.seed,
                 "token": job.order.token, "account": job.order.account, "mode": job.order.mode, "phase": job.phase,
                 "polls": job.polls, "downloads": job.downloads, "billed": job.billed, "created_at": job.created_at,
                 "fields": job.order.fields}
                for job in self.jobs.values()
            ]  # fmt: skip
            return {"accepted": dict(self.accepted), "orders": dict(self.orders), "jobs": jobs,
                    "requests": list(self.requests)}  # fmt: skip


def _lose_the_answer(mode: str) -> None:
    """What becomes of the first answer to an accepted order.  Raises Trouble, Dropped."""
    if mode == "500-after-accept":
        raise Trouble("broken")
    if mode == "drop-after-accept":
        raise Dropped
    if mode == "timeout-after-accept":
        time.sleep(HELD_S)


def shape_of(video: VideoConfig) -> dict[str, Any]:
    """How services describe their videos: `size` as WIDTHxHEIGHT, `seconds` rounded up."""
    return {"size": f"{video.width}x{video.height}", "seconds": str(max(1, -(-video.frames // round(video.fps))))}
