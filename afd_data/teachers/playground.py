"""The playground as a teacher: free, exact, local; a video is a function of (prompt, seed, video settings, config)."""

from __future__ import annotations

from pathlib import Path

from afd_data.teacher_config import PlaygroundConfig
from afd_data.teachers import Delivery, Free, Identity, Request
from afd_data.teachers.scene import parse
from afd_data.teachers.world import simulate
from afd_data.video import write_mp4


class Playground(Free):
    """See `scene` for what it understands and `world` for how things move there."""

    def __init__(self, config: PlaygroundConfig) -> None:
        self._config = config
        self.identity = Identity(
            name="playground",
            version="1",
            settings=config.model_dump(mode="json", exclude={"name"}),
            licence="CC0-1.0",
            distillation="allowed",
        )

    def prompts(self) -> list[str]:
        """None of its own: it draws any prompt that names a ball or a box."""
        return []

    def submit(self, request: Request) -> str:
        """Accept what can be drawn.  Raises RefusedError for a prompt without a known object."""
        parse(request.prompt)
        return request.fingerprint

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Draw the video into `target` (mp4).  Raises RefusedError as `submit` does."""
        config = self._config
        frames, world = simulate(
            request.prompt, request.seed, request.video, config.flaws, config.style, config.determined
        )
        write_mp4(target, frames, request.video)
        return Delivery(effective=request.video.model_dump(), provenance={"seed": request.seed}, world=world)
