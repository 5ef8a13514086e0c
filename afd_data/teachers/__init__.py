"""Teachers: one file each behind one small Protocol.

How to write one.  A teacher turns a `Request` into a video file.  It is asked in three calls, so that a process that
dies in between can be followed by another that knows only what the journal kept:

* `submit` asks for the video and returns the provider's job id.  The journal holds the intent before the call and the
  id right after it.  Never retry inside: an outcome that is not known is for the journal to record.
* `poll` tells how the job stands.
* `fetch` writes the finished video, in whatever container, to `target`, and says what was really done.

Local teachers do their work in `fetch` and use the request's fingerprint as job id.  Add the config class to
`afd_data.config.TeacherConfig` and a `case` to `open_teacher`; nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from afd_data.config import TeacherConfig, VideoConfig


class RefusedError(Exception):
    """The teacher will not make this video (moderation, no such caption); asking again would not help."""


class FailedError(Exception):
    """The teacher tried and failed; asking again may help."""


@dataclass(frozen=True)
class Request:
    """One video for one prompt.  `fingerprint` identifies it across processes and machines."""

    fingerprint: str
    prompt_id: str
    prompt: str
    take: int
    seed: int  # follows from (recipe seed, prompt id, take, generation)
    video: VideoConfig


@dataclass(frozen=True)
class Delivery:
    """What came back beside the file: all JSON-able."""

    effective: dict = field(default_factory=dict)  # settings the teacher says it used
    provenance: dict = field(default_factory=dict)  # where the video is from; never a secret or a signed URL
    world: dict = field(default_factory=dict)  # exact state of a simulated world
    cost: float = 0.0
    currency: str = "USD"


@dataclass(frozen=True)
class Identity:
    """What a fingerprint hashes of the teacher: a change of any field makes new requests."""

    name: str
    version: str  # bump when the same settings would draw another video
    settings: dict  # everything that changes the video
    licence: str = "unknown"
    distillation: Literal["allowed", "disallowed", "unknown"] = "unknown"
    paid: bool = False  # a paid request whose outcome is unknown is never repeated by itself


class Teacher(Protocol):
    """See the module's how-to."""

    identity: Identity

    def prompts(self) -> list[str]:
        """Prompts that the teacher brings along (captions); [] if it takes any."""
        ...

    def submit(self, request: Request) -> str:
        """Ask; return the job id.  Raises RefusedError or FailedError."""
        ...

    def poll(self, job_id: str) -> Literal["running", "ready"]:
        """How the job stands.  Raises RefusedError or FailedError."""
        ...

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Write the video to `target` (any container that PyAV reads).  Raises RefusedError or FailedError."""
        ...


def open_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that a recipe names.  Raises UserError when it cannot work (no such folder, no captions)."""
    match config.name:
        case "playground":
            from afd_data.teachers.playground import Playground

            return Playground(config)
        case "folder":
            from afd_data.teachers.folder import Folder

            return Folder(config)
