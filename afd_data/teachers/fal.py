"""Teacher `fal`: fal.ai's queue, which runs Seedance, Veo, Kling and others.

What an app takes beside `prompt` and `seed` is its own affair: `teacher.options`.  fal echoes nothing of an order that
is unique, so that one whose answer got lost cannot be found again.
"""

from __future__ import annotations

from afd_data.provider_config import FalConfig
from afd_data.teachers import Request, UnreachableError
from afd_data.teachers.http import DeclinedError
from afd_data.teachers.provider import Provider, Report, State, below, expiry, order_of, section, told

WAITING: dict[str, State] = {"IN_QUEUE": "queued", "IN_PROGRESS": "running"}
NAMESPACES = ("workflows", "comfy")
ECHOED = ("seed", "prompt", "timings", "duration", "fps")


class Fal(Provider):
    """See the module."""

    def __init__(self, config: FalConfig) -> None:
        self._config = config
        super().__init__(config, "fal", {"model": config.app, "options": config.options}, paid=True, scheme="Key")

    def submit(self, request: Request) -> str:
        """The request's id.  Raises RefusedError, FailedError, UnknownError, UserError."""
        order = order_of({"prompt": request.prompt, "seed": request.seed}, self._config.options)
        with self.ordering():
            answer = self.client.order(self._config.app, order, headers={"Idempotency-Key": request.token})
        return self.job_id(answer, "request_id")

    def look(self, job_id: str) -> Report:
        """How a request stands.  Raises LostError, UnreachableError, UserError."""
        path = below(f"{queue_of(self._config.app)}/requests", job_id)
        status = self.client.ask(f"{path}/status")
        word = str(status.get("status"))
        if word in WAITING:
            return Report(WAITING[word])
        if word != "COMPLETED":
            raise UnreachableError(f"request {job_id} is {word!r}, which afd does not know")
        if status.get("error") or status.get("error_type"):
            return Report("failed", error=told(status, ("error", "error_type")))
        try:
            result = self.client.ask(path)
        except DeclinedError as error:  # some apps tell of their failure only here
            return Report("failed", error=error.body or str(error))
        videos = result.get("videos")
        video = section(result, "video") or (videos[0] if isinstance(videos, list) and videos else {})
        address = str(video.get("url") or "")
        return Report("ready", address, fetch_before=expiry(address), effective=told(result, ECHOED))


def queue_of(app: str) -> str:
    """The address of an app's queue: OWNER/NAME, without the path of the endpoint."""
    parts = app.strip("/").split("/")
    return "/".join(parts[: 3 if parts[0] in NAMESPACES else 2])
