"""Teacher `videos`: servers of the /v1/videos protocol, self-hosted or not.

`DIALECTS` says how they differ.  `teacher.base_url` ends where `/videos` begins, for example http://HOST:8000/v1 or
https://openrouter.ai/api/v1.  Self-hosted servers keep jobs in memory: after a restart they know them no more, and are
asked again, which is free.  No server echoes anything of an order that is unique.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from afd_data.provider_config import VideosConfig
from afd_data.teachers import Request, UnreachableError
from afd_data.teachers.provider import Provider, Report, State, below, number, order_of, seconds, section, told


@dataclass(frozen=True)
class Dialect:
    """How a server is asked.

    size: width and height apart, as WIDTHxHEIGHT, or as WIDTHxHEIGHT only where the recipe names it;
    length: frames and rate, or seconds under this name.
    """

    encoding: Literal["json", "multipart"]
    size: Literal["apart", "joined", "named"]
    length: Literal["frames", "seconds", "duration"]
    paid: bool


DIALECTS = {
    "vllm-omni": Dialect("multipart", "apart", "frames", paid=False),
    "sglang": Dialect("json", "joined", "frames", paid=False),
    "fastvideo": Dialect("json", "joined", "frames", paid=False),
    "openrouter": Dialect("json", "named", "duration", paid=True),
    "generic": Dialect("multipart", "joined", "seconds", paid=True),  # may be a gateway that bills
}
STATES: dict[str, State] = {
    "queued": "queued",
    "pending": "queued",
    "in_progress": "running",
    "processing": "running",
    "running": "running",
    "completed": "ready",
    "succeeded": "ready",
    "failed": "failed",
    "cancelled": "failed",
    "expired": "failed",
    "error": "failed",
}
ECHOED = ("model", "seed", "size", "seconds", "fps", "num_frames", "revised_prompt", "generation_id")


class Videos(Provider):
    """See the module."""

    def __init__(self, config: VideosConfig) -> None:
        self._config = config
        self._dialect = DIALECTS[config.dialect]
        names = ("dialect", "model", "seconds", "size", "options")
        super().__init__(
            config,
            "videos",
            {name: config.model_dump()[name] for name in names},
            paid=self._dialect.paid if config.paid is None else config.paid,
        )

    def submit(self, request: Request) -> str:
        """The job's id.  Raises RefusedError, FailedError, UnknownError, UserError."""
        order = order_of(self._order(request), self._config.options)
        encoding = self._dialect.encoding if self._config.encoding == "auto" else self._config.encoding
        headers = {"Idempotency-Key": request.token}
        with self.ordering():
            if encoding == "json":
                return self.job_id(self.client.order("videos", json=order, headers=headers))
            fields = {name: value if isinstance(value, str) else json.dumps(value) for name, value in order.items()}
            return self.job_id(self.client.order("videos", fields=fields, headers=headers))

    def look(self, job_id: str) -> Report:
        """How a job stands.  Raises LostError, UnreachableError, UserError."""
        job = self.client.ask(below("videos", job_id))
        word = str(job.get("status"))
        state = self._config.states.get(word) or STATES.get(word)
        if state is None:
            raise UnreachableError(
                f"job {job_id} is {word!r}; say in teacher.states what this word of the server means"
            )
        return Report(
            state,
            below("videos", job_id, "/content"),
            fetch_before=seconds(job.get("expires_at")) or math.inf,
            created_at=seconds(job.get("created_at")),
            cost=number(section(job, "usage"), "cost"),
            effective=told(job, ECHOED),
            error=job.get("error") or word,
        )

    def _order(self, request: Request) -> dict[str, Any]:
        config, dialect, video = self._config, self._dialect, request.video
        fields: dict[str, Any] = {"model": config.model, "prompt": request.prompt, "seed": request.seed}
        size = config.size or (None if dialect.size == "named" else f"{video.width}x{video.height}")
        if size and dialect.size == "apart":
            width, height = size.split("x")
            fields |= {"width": int(width), "height": int(height)}
        else:
            fields["size"] = size
        length = config.seconds or math.ceil(video.frames / video.fps)
        if dialect.length == "duration":
            fields["duration"] = length
        elif dialect.length == "seconds":
            fields["seconds"] = str(length)  # as OpenAI's own client sends it
        else:
            rate = math.ceil(video.fps)  # whole numbers only; what is too much is left out on arrival
            frames = config.seconds * rate if config.seconds else math.ceil(video.frames * rate / video.fps)
            fields |= {"fps": rate, "num_frames": frames}
        return fields
