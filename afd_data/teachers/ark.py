"""Teacher `ark`: Seedance on the Ark protocol, as BytePlus and Volcengine serve it.

The request's token travels as `safety_identifier`, which tasks and their list echo: an order whose answer got lost can
be found again within 7 days.  Billed by `usage.completion_tokens`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

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
        return Report(
            STATES[word],
            address,
            fetch_before=min(expiry(address), (ended_at or float("inf")) + DAY_S),
            created_at=seconds(task.get("created_at")),
            cost=None if tokens is None or not self._config.price_per_million_tokens else self._price(tokens),
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
            page, done = 0, False
            while not done:
                page += 1
                query = {"page_num": page, "page_size": PAGE, "filter.service_tier": tier}
                answer = self.client.ask(TASKS, query)
                tasks, total = answer.get("items") or [], number(answer, "total")
                for task in tasks:
                    made_at = seconds(task.get("created_at")) or 0.0
                    if task["id"] not in seen and made_at >= since:
                        yield Job(task["id"], task.get("safety_identifier") or "", made_at)
                    seen.add(task["id"])
                done = not tasks or (total is not None and page * PAGE >= total)

    def _price(self, tokens: float) -> float:
        return tokens * self._config.price_per_million_tokens / 1e6


def pixels(resolution: str) -> float:
    """Of a frame; resolutions name the short side of 16:9, and all ratios have about as many pixels."""
    short = {"2k": 1440, "4k": 2160}.get(resolution) or int(resolution.removesuffix("p"))
    return short * short * 16 / 9
