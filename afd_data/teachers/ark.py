"""Teacher `ark`: Seedance on the Ark protocol, as BytePlus and Volcengine serve it.

The request's token travels as `safety_identifier`, which tasks and their list echo: an order whose answer got lost can
be found again within 7 days.  Billed by `usage.completion_tokens`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.provider_config import ArkConfig
from afd_data.teachers import Job, Request, UnreachableError
from afd_data.teachers.provider import (
    DAY_S,
    Provider,
    Report,
    State,
    below,
    expiry,
    number,
    order_of,
    seconds,
    section,
    told,
)

TASKS = "contents/generations/tasks"
FPS = 24  # of all Seedance models
LISTED_S = 7 * DAY_S
CLOCKS_S = 300.0  # by which the provider's clock may differ from ours
PAGE = 100
STATES: dict[str, State] = {
    "queued": "queued",
    "running": "running",
    "succeeded": "ready",
    "failed": "failed",
    "cancelled": "failed",
    "expired": "failed",
}
ECHOED = ("model", "seed", "resolution", "ratio", "duration", "frames", "framespersecond", "generate_audio",
          "service_tier", "revised_prompt")  # fmt: skip


class Ark(Provider):
    """See the module.  Also a `Listing`."""

    def __init__(self, config: ArkConfig) -> None:
        self._config = config
        names = ("model", "resolution", "ratio", "duration_s", "audio", "watermark", "service_tier", "options")
        super().__init__(config, "ark", {name: config.model_dump()[name] for name in names}, paid=True)

    def estimate(self, video: VideoConfig) -> float:
        """Tokens (width x height x fps x seconds / 1024) times their price; without one `teacher.price`."""
        if not self._config.price_per_million_tokens:
            return self._config.price
        return self._price(pixels(self._config.resolution) * FPS * self._config.duration_s / 1024)

    def submit(self, request: Request) -> str:
        """The task's id.  Raises RefusedError, FailedError, UnknownError, UserError."""
        config = self._config
        order = order_of(
            {
                "model": config.model,
                "content": [{"type": "text", "text": request.prompt}],
                "resolution": config.resolution,
                "ratio": config.ratio,
                "duration": config.duration_s,
                "generate_audio": config.audio,
                "watermark": config.watermark,
                "service_tier": "flex" if config.service_tier == "flex" else None,
                "seed": request.seed,
            },
            config.options,
        )
        order["safety_identifier"] = request.token
        with self.ordering():
            return self.job_id(self.client.order(TASKS, order, headers={"Idempotency-Key": request.token}))

    def look(self, job_id: str) -> Report:
        """How a task stands.  Raises LostError, UnreachableError, UserError."""
        task = self.client.ask(below(TASKS, job_id))
        word = str(task.get("status"))
        if word not in STATES:
            raise UnreachableError(f"task {job_id} is {word!r}, which afd does not know")
        address = str(section(task, "content").get("video_url") or "")
        tokens, ended_at = number(section(task, "usage"), "completion_tokens"), seconds(task.get("updated_at"))
        if STATES[word] == "failed" and not tokens:
            cost = 0.0  # tokens are what is billed
        else:
            cost = None if tokens is None or not self._config.price_per_million_tokens else self._price(tokens)
        return Report(
            STATES[word],
            address,
            fetch_before=min(expiry(address), (ended_at or float("inf")) + DAY_S),
            created_at=seconds(task.get("created_at")),
            cost=cost,
            effective=told(task, ECHOED),
            error=task.get("error") or word,
        )

    def jobs(self, since: float) -> Iterator[Job]:
        """All tasks made after `since` (seconds since 1970).  Raises UnreachableError; UserError beyond 7 days."""
        if since < time.time() - LISTED_S:
            raise UserError(
                f"{self.client.host} lists the tasks of 7 days only: what became of older orders must be looked up "
                "in its console. Then decide with `afd cache resubmit`."
            )
        return self._jobs(since - CLOCKS_S)

    def _jobs(self, since: float) -> Iterator[Job]:
        seen: set[str] = set()
        for tier in ("default", "flex"):  # the list leaves out other tiers than the one it is asked for
            before: list[Job | None] = []
            for page in count(1):  # to the first empty one, however many tasks the service puts on a page
                query = {"page_num": page, "page_size": PAGE, "filter.service_tier": tier}
                tasks = self.client.ask(TASKS, query).get("items") or []
                jobs: list[Job | None] = [_listed(task) for task in tasks] if isinstance(tasks, list) else [None]
                if None in jobs:
                    raise UnreachableError("the list of tasks is not readable, so it proves nothing")
                if not jobs or jobs == before:  # a service that knows no pages sends the same one again
                    break
                before = jobs
                for job in jobs:
                    if job is not None and job.job_id not in seen and job.created_at >= since:
                        yield job
                        seen.add(job.job_id)

    def _price(self, tokens: float) -> float:
        return tokens * self._config.price_per_million_tokens / 1e6


def _listed(task: object) -> Job | None:
    """None where it is no task."""
    if not isinstance(task, dict) or not isinstance(task.get("id"), str):
        return None
    token = task.get("safety_identifier")
    return Job(task["id"], token if isinstance(token, str) else "", seconds(task.get("created_at")) or 0.0)


def pixels(resolution: str) -> float:
    """Of a frame; resolutions name the short side of 16:9, and all ratios have about as many pixels."""
    short = {"2k": 1440, "4k": 2160}.get(resolution) or int(resolution.removesuffix("p"))
    return short * short * 16 / 9
