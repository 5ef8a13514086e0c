"""What the teachers behind HTTP share: orders and refusals, how a job stands, and the way of a video to its file.

A teacher adds how its service words an order (`submit`) and what it says of a job (`look`).
"""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, urlsplit

from afd_data.acceptance import RejectedError
from afd_data.config import VideoConfig
from afd_data.provider_config import ProviderConfig
from afd_data.teachers import (
    Delivery,
    FailedError,
    Identity,
    LostError,
    Progress,
    RefusedError,
    Request,
    UnknownError,
    UnreachableError,
)
from afd_data.teachers.delivery import deliver
from afd_data.teachers.http import NO_ENTRY, Client, DeclinedError

State = Literal["queued", "running", "ready", "failed", "refused"]
DAY_S = 86_400.0
YOUNG_S = 60.0  # for so long may a job that was just taken be unknown to the service's own list
CODES = ("code", "type", "error_type", "failureCode")
MESSAGES = ("message", "msg", "error", "failure", "detail")
_REFUSAL = re.compile(
    r"sensitive|moderat|safety|content.?(policy|filter)|policy.?violation|prohibited|flagged|risk.?detect", re.I
)


@dataclass(frozen=True)
class Report:
    """What a service says of a job.  `address` is the video's URL, or a path below the API; error: why it failed."""

    state: State
    address: str = ""
    fetch_before: float = math.inf  # seconds since 1970
    created_at: float | None = None  # seconds since 1970
    cost: float | None = None
    effective: dict = field(default_factory=dict)
    error: object = None


class Provider:
    """A teacher behind HTTP.  `settings` is what changes the video; `scheme` and `headers` as for `Client`."""

    def __init__(
        self,
        config: ProviderConfig,
        name: str,
        settings: dict[str, Any],
        paid: bool,
        scheme: str = "Bearer",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._rules = config
        self.client = Client(config, scheme, headers)
        self._unseen: dict[str, float] = {}  # time.monotonic() of the orders for jobs that were never found yet
        self.identity = Identity(
            name=name,
            version=config.version,
            settings={**settings, "fit": config.fit, "short": config.short, "start": config.start},
            licence=config.licence,
            distillation=config.distillation,
            terms_url=config.terms_url,
            paid=paid,
            currency=config.currency,
        )

    def prompts(self) -> list[str]:
        """None of its own: it takes any prompt, and refuses some."""
        return []

    def estimate(self, video: VideoConfig) -> float:
        """`teacher.price`."""
        return self._rules.price

    def turn(self, stop: threading.Event) -> bool:
        """Wait as long as the traffic rules and the provider want; False when told to stop."""
        return self.client.turn(stop)

    def look(self, job_id: str) -> Report:
        """Ask the service once how a job stands.  Raises LostError, UnreachableError, UserError."""
        raise NotImplementedError

    def poll(self, job_id: str) -> Progress:
        """How the job stands.  Raises RefusedError, FailedError, LostError, UnreachableError, UserError."""
        try:
            report = self.look(job_id)
        except LostError:
            if time.monotonic() < self._unseen.get(job_id, -math.inf) + YOUNG_S:
                return Progress("queued")  # what was written is not everywhere to be read at once
            raise
        self._unseen.pop(job_id, None)
        return Progress(self._in_hand(report), report.fetch_before)

    def fetch(self, job_id: str, request: Request, target: Path) -> Delivery:
        """Download the video and bring it to what was asked for.  Raises as `poll` does."""
        report = self._ready(job_id)
        addresses = self._addresses(job_id, report)
        source = target.with_name(target.name + ".download")
        try:
            self.client.download(lambda: next(addresses), source, report.fetch_before)
            done = deliver(source, target, request, self._rules, f"job {job_id}")
        except RejectedError as error:
            error.cost = report.cost
            raise
        finally:
            source.unlink(missing_ok=True)
        model = report.effective.get("model") or self.identity.settings.get("model")
        provenance = {"job": job_id, "model": model, "provider": self.client.host, "created_at": report.created_at}
        return Delivery(effective={**done, "provider": report.effective}, provenance=provenance, cost=report.cost)

    @contextmanager
    def ordering(self) -> Iterator[None]:
        """Around an order: what the service declines becomes RefusedError, FailedError or UserError."""
        try:
            yield
        except DeclinedError as error:
            if is_refusal(error.body):
                raise RefusedError(str(error)) from None
            if error.status in NO_ENTRY:
                raise self.client.no_entry(error.status, str(error)) from None
            raise FailedError(f"not taken: {error}") from None

    def job_id(self, answer: dict, name: str = "id") -> str:
        """The job's id in the answer to an order.  Raises UnknownError where there is none."""
        job_id = answer.get(name)
        if not isinstance(job_id, str) or not job_id:
            raise UnknownError(f"the order was taken, but the answer has no {name!r}: {self.client.clean(answer)}")
        self._unseen[job_id] = time.monotonic()
        return job_id

    def _ready(self, job_id: str) -> Report:
        report = self.look(job_id)
        if self._in_hand(report) != "ready":
            raise UnreachableError(f"job {job_id} is {report.state}, not ready")
        return report

    def _addresses(self, job_id: str, report: Report) -> Iterator[str]:
        """Addresses of the video: the first is known, every further one is asked for."""
        while True:
            if not report.address:
                raise UnreachableError(f"job {job_id} is ready, but the provider gives no address of its video")
            yield report.address
            report = self._ready(job_id)

    def _in_hand(self, report: Report) -> Literal["queued", "running", "ready"]:
        if report.state == "failed" or report.state == "refused":
            codes, messages = _words(report.error)
            text = self.client.clean(": ".join([*codes, *messages]) or report.error or report.state)
            if report.state == "refused" or is_refusal(report.error):
                raise RefusedError(text, report.cost)
            raise FailedError(text, report.cost)
        return report.state


def order_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an order with the recipe's options over them; None leaves a field out."""
    return {name: value for name, value in {**fields, **options}.items() if value is not None}


def below(folder: str, job_id: str, rest: str = "") -> str:
    """A path for a job's id, whatever characters a provider puts into one."""
    return f"{folder}/{quote(job_id, safe='')}{rest}"


def is_refusal(said: object) -> bool:
    """Whether what a provider said (text, or JSON) is moderation.  Where it gives codes, these alone count."""
    codes, messages = _words(said)
    return any(_REFUSAL.search(word) for word in codes or messages)


def expiry(url: str) -> float:
    """When a signed address expires, in seconds since 1970; infinity where it does not say (S3, GCS, TOS, Azure)."""
    try:
        query = {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    except ValueError:  # no address at all, which the download will say
        return math.inf
    for vendor in ("amz", "goog", "tos"):
        if f"x-{vendor}-date" in query:
            try:
                signed = datetime.strptime(query[f"x-{vendor}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return signed.timestamp() + float(int(query[f"x-{vendor}-expires"]))
            except (KeyError, ValueError, OverflowError):
                return math.inf
    if query.get("expires", "").isdecimal():
        return float(query["expires"])
    return seconds(query["se"]) or math.inf if "se" in query else math.inf


def seconds(moment: object) -> float | None:
    """Seconds since 1970 of a number or an ISO 8601 text; None for anything else."""
    try:
        if isinstance(moment, int | float) and not isinstance(moment, bool):
            return float(moment) if math.isfinite(moment) else None
        return datetime.fromisoformat(str(moment)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def section(answer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `name` of an answer, {} where there is none."""
    found = answer.get(name)
    return found if isinstance(found, dict) else {}


def number(answer: Mapping[str, Any], name: str) -> float | None:
    """The number `name` of an answer, finite and not negative; None where there is none."""
    found = answer.get(name)
    if not isinstance(found, int | float) or isinstance(found, bool):
        return None
    return float(found) if 0 <= found <= sys.float_info.max else None


def told(answer: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of `names` that the answer says something about."""
    return {name: answer[name] for name in names if answer.get(name) is not None}


def _words(said: object) -> tuple[list[str], list[str]]:
    """Codes and messages, at any depth."""
    if isinstance(said, str):
        return [], [said]
    parts = list(said.values()) if isinstance(said, dict) else said if isinstance(said, list) else []
    inner = [_words(part) for part in parts if isinstance(part, dict | list)]
    codes = [word for found, _ in inner for word in found]
    messages = [word for _, found in inner for word in found]
    if isinstance(said, dict):
        codes += [said[name] for name in CODES if isinstance(said.get(name), str)]
        messages += [said[name] for name in MESSAGES if isinstance(said.get(name), str)]
    return codes, messages
