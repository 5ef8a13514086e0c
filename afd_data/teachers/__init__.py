"""Teachers: one file each behind one small Protocol.

How to write one.  A teacher turns a `Request` into a video file.  It is asked in four calls, so that a process that
dies in between can be followed by another that knows only what the journal kept:

* `turn` waits until another order may be sent.  Waiting belongs here: what is waited for in `submit` is already written
  down as an order that may have been taken.
* `submit` asks for the video and returns the provider's job id.  The journal holds the intent before the call and the
  id right after it.  Never retry inside what may have arrived: an outcome that is not known is for the journal to
  record, so let the error through.
* `poll` tells how the job stands.  It may be called by a process that never called `submit`.
* `fetch` writes the finished video, in whatever container, to `target`, and says what was really done.  It may be
  called again, and must then deliver the same video.

Local teachers do their work in `fetch` and use the request's fingerprint as job id.  Teachers behind HTTP use
`http.Client` for every request and `delivery.deliver` for every file, and nothing else of the network.  A provider that
lists its jobs also has `jobs` (see `Listing`), so that `afd cache reconcile` can tell what became of an order.

Add the config class to `afd_data.config.TeacherConfig` and a `case` to `open_teacher`; nothing else.

What goes wrong is one of these errors, and everything else is a bug:

| raised | what it means | what becomes of the sample |
|---|---|---|
| RefusedError | it will not make this video | `refused`, never asked again by itself |
| FailedError | it tried and failed | `failed`; free: asked again by the next run |
| UnknownError (submit) | it may have taken the order, or not | `unknown`: only a person or reconcile decides |
| LostError (poll, fetch) | it knows nothing of this job any more | paid: `unknown`; free: asked again |
| UnreachableError (poll, fetch) | it cannot be asked now | stays as it is, for the next run |
| RejectedError (fetch; from `deliver`) | what it made is no video, or too short | `rejected`, paid all the same |
| UserError | it takes no order at all: wrong key, no credit | the run stops; nothing was ordered |
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from afd_data.config import TeacherConfig, VideoConfig


class _ChargedError(Exception):
    """cost: what was charged all the same, in the identity's currency; None: charged, but not told how much."""

    def __init__(self, text: str, cost: float | None = 0.0) -> None:
        super().__init__(text)
        self.cost = cost


class RefusedError(_ChargedError):
    """The teacher will not make this video (moderation, no such caption); asking again would not help."""


class FailedError(_ChargedError):
    """The teacher tried and failed, or took no order; asking again may help."""


class UnknownError(Exception):
    """The order may have arrived: no answer, or a server's error."""


class LostError(Exception):
    """The provider does not know the job, or no longer has the video."""


class UnreachableError(Exception):
    """No answer to a question that may be asked again later."""


@dataclass(frozen=True)
class Request:
    """One video for one prompt.  `fingerprint` identifies it across processes and machines."""

    fingerprint: str
    prompt_id: str
    prompt: str
    take: int
    seed: int  # in [0, 2**31); follows from (recipe seed, prompt id, take, generation)
    video: VideoConfig

    @property
    def token(self) -> str:
        """What a provider is asked to echo, so that an order whose answer got lost can be found again."""
        return order_token(self.fingerprint)


def order_token(fingerprint: str) -> str:
    """The token of the order for a request: 44 characters of a-z, 0-9 and -."""
    return f"afd-{fingerprint[:40]}"


@dataclass(frozen=True)
class Progress:
    """How a job stands.  A ready video can be fetched until `fetch_before`, in seconds since 1970."""

    state: Literal["queued", "running", "ready"]
    fetch_before: float = inf


@dataclass(frozen=True)
class Delivery:
    """What came back beside the file: all JSON-able."""

    effective: dict = field(default_factory=dict)  # settings the teacher says it used
    provenance: dict = field(default_factory=dict)  # where the video is from; never a secret or a signed URL
    world: dict = field(default_factory=dict)  # exact state of a simulated world
    cost: float | None = None  # in the identity's currency; None: not told, so what was estimated is taken


@dataclass(frozen=True)
class Identity:
    """Who the teacher is.  A fingerprint hashes name, version and settings: a change of these makes new requests."""

    name: str
    version: str  # bump when the same settings would draw another video
    settings: dict  # everything that changes the video
    licence: str = "unknown"
    distillation: Literal["allowed", "disallowed", "unknown"] = "unknown"
    terms_url: str = ""
    paid: bool = False  # a paid request whose outcome is unknown is never repeated by itself
    currency: str = "USD"


class Teacher(Protocol):
    """See the module's how-to.  All methods may be called from several threads at once."""

    identity: Identity

    def prompts(self) -> list[str]:
        """Prompts that the teacher brings along (captions); [] if it takes any."""
        ...

    def estimate(self, video: VideoConfig) -> float:
        """What a video will cost, in the identity's currency; 0.0 for a free teacher."""
        ...

    def turn(self, stop: threading.Event) -> bool:
        """Wait until another order may be sent; False when told to stop.  Called before every `submit`."""
        ...

    def submit(self, request: Request) -> str:
        """Ask; return the job id.  Raises RefusedError, FailedError, UnknownError, UserError."""
        ...

    def poll(self, job_id: str) -> Progress:
        """How the job stands.  Raises RefusedError, FailedError, LostError, UnreachableError, UserError."""
        ...

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Write the video to `target` (any container that PyAV reads).  Raises as `poll` does."""
        ...


@dataclass(frozen=True)
class Job:
    """A job as the provider lists it; token: what it echoes of `Request.token`, "" if nothing."""

    job_id: str
    token: str
    created_at: float  # seconds since 1970


@runtime_checkable
class Listing(Protocol):
    """A teacher whose provider lists its jobs: what is not listed was never taken."""

    def jobs(self, since: float) -> Iterator[Job]:
        """All jobs made after `since` (seconds since 1970), whatever their state.

        Raises UnreachableError, UserError; and UserError too when the provider no longer lists that far back, since
        what is not listed then proves nothing.
        """
        ...


class Free:
    """What local teachers have in common: no price, and the work is done in `fetch`."""

    def estimate(self, video: VideoConfig) -> float:
        """Nothing."""
        return 0.0

    def turn(self, stop: threading.Event) -> bool:
        """Always at once."""
        return True

    def poll(self, job_id: str) -> Progress:
        """Always ready."""
        return Progress("ready")


def open_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that a recipe names.  Raises UserError when it cannot work (no such folder, no captions, no key)."""
    match config.name:
        case "playground":
            from afd_data.teachers.playground import Playground

            return Playground(config)
        case "folder":
            from afd_data.teachers.folder import Folder

            return Folder(config)
        case "local":
            from afd_data.teachers.local import Local

            return Local(config)
        case "command":
            from afd_data.teachers.command import Command

            return Command(config)
        case "hub":
            from afd_data.teachers.hub import Hub

            return Hub(config)
        case "ark":
            from afd_data.teachers.ark import Ark

            return Ark(config)
        case "videos":
            from afd_data.teachers.videos import Videos

            return Videos(config)
        case "fal":
            from afd_data.teachers.fal import Fal

            return Fal(config)
        case "runway":
            from afd_data.teachers.runway import Runway

            return Runway(config)
