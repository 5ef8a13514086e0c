"""What goes over the wire: a request as the services see it, an answer as they give it.  Knows no service."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any, Literal

from tests.provider import TEST_KEY


@dataclass(frozen=True)
class Question:
    """A request.  `path` is below the service's own address, without query; header names are in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    origin: str  # http://HOST:PORT that the client addressed

    @property
    def is_multipart(self) -> bool:
        return self.headers.get("content-type", "").startswith("multipart/form-data")

    def holds_key(self, scheme: str = "Bearer") -> bool:
        """Whether the right key came along."""
        return self.headers.get("authorization", "") == f"{scheme} {TEST_KEY}"

    def fields(self) -> dict[str, Any]:
        """The body's fields, JSON or multipart; {} where it is neither."""
        if self.is_multipart:
            head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
            return dict(_parts(head + self.body))
        try:
            fields = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return fields if isinstance(fields, dict) else {}

    def number(self, name: str, default: int) -> int:
        """A number of the query."""
        return int(self.query.get(name, [str(default)])[0])


@dataclass(frozen=True)
class Answer:
    """An answer, or the lack of one.

    `sent`: whole; `cut`: says its full length and stops in the middle; `unsized`: the same without a length, so that
    nobody can tell; `none`: the connection ends without an answer.
    """

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    fate: Literal["sent", "cut", "unsized", "none"] = "sent"


def say(status: int, body: object, **headers: str) -> Answer:
    """A JSON answer; `Retry_After` in `headers` becomes `Retry-After`."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps(body).encode(), headers=names)


def _parts(message: bytes) -> list[tuple[str, str]]:
    found = []
    for part in message_from_bytes(message).walk():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            found.append((name, content.decode(errors="replace")))
    return found
