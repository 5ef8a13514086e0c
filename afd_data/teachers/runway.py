"""Teacher `runway`: one protocol for Gen-4.5, Veo, Kling, Seedance, Hailuo.

What a model takes differs: `teacher.options` adds fields and null leaves one out, for example `{seed: null}` for the
models without a seed.  Billed in credits, which every finished task tells.  Nothing of an order is echoed or listed, so
that one whose answer got lost cannot be found again.
"""

from __future__ import annotations

from afd_data.provider_config import RunwayConfig
from afd_data.teachers import Request, UnreachableError
from afd_data.teachers.provider import DAY_S, Provider, Report, State, below, expiry, number, order_of, seconds, section

VERSION = "2024-11-06"  # of the API
STATES: dict[str, State] = {
    "PENDING": "queued",
    "THROTTLED": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "ready",
    "FAILED": "failed",
    "CANCELLED": "failed",
}


class Runway(Provider):
    """See the module."""

    def __init__(self, config: RunwayConfig) -> None:
        self._config = config
        settings = {name: config.model_dump()[name] for name in ("model", "ratio", "duration_s", "options")}
        super().__init__(config, "runway", settings, paid=True, headers={"X-Runway-Version": VERSION})

    def submit(self, request: Request) -> str:
        """The task's id.  Raises RefusedError, FailedError, UnknownError, UserError."""
        config = self._config
        order = order_of(
            {
                "model": config.model,
                "promptText": request.prompt,
                "ratio": config.ratio,
                "duration": config.duration_s,
                "seed": request.seed,
            },
            config.options,
        )
        with self.ordering():
            answer = self.client.order("v1/text_to_video", order, headers={"Idempotency-Key": request.token})
        return self.job_id(answer)

    def look(self, job_id: str) -> Report:
        """How a task stands.  Raises LostError, UnreachableError, UserError."""
        task = self.client.ask(below("v1/tasks", job_id))
        word = str(task.get("status"))
        if word not in STATES:
            raise UnreachableError(f"task {job_id} is {word!r}, which afd does not know")
        output, created_at = task.get("output"), seconds(task.get("createdAt"))
        address = str(output[0]) if isinstance(output, list) and output else ""
        credits = number(section(task, "cost"), "credits")
        return Report(
            STATES[word],
            address,
            fetch_before=min(expiry(address), (created_at or float("inf")) + DAY_S),
            created_at=created_at,
            cost=None if credits is None else credits * self._config.price_per_credit,
            effective={} if credits is None else {"credits": credits},
            error={name: task[name] for name in ("failureCode", "failure") if task.get(name)} or word,
        )
