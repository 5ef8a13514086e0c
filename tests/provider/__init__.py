"""A fake provider in a process of its own: services that sell videos, over loopback, with everything that goes wrong.

It speaks the protocols of Ark, OpenAI's videos (and its self-hosted dialects), OpenRouter, fal's queue and Runway.
What goes wrong with a job is said by its prompt (see `shop`).  It counts the orders that it accepted.  The official
clients of these services are its tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEST_KEY = "test-key-of-the-fake-provider-0123456789"
BASES = {
    "ark": "/ark/api/v3",
    "videos": "/videos/v1",
    "vllm-omni": "/vllm-omni/v1",
    "sglang": "/sglang/v1",
    "fastvideo": "/fastvideo/v1",
    "openrouter": "/openrouter/api/v1",
    "fal": "/fal",
    "runway": "/runway",
}
VIDEO = "64x48,24,12.0"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Provider:
    """A running provider at `url` (http://127.0.0.1:PORT)."""

    url: str

    def base(self, service: str) -> str:
        """The base URL that clients of a service are given."""
        return self.url + BASES[service]

    def reset(self, video: str = VIDEO) -> None:
        """Forget everything; videos are `WIDTHxHEIGHT,FRAMES,FPS` from now on."""
        self._control("reset", {"video": video})

    def forget(self) -> None:
        """Forget all jobs, as a server that starts again and kept them in memory; the counts stay."""
        self._control("forget", {})

    def limit_pages(self, jobs: int) -> None:
        """Put at most so many jobs on a page of a list, whatever is asked for, until `reset`."""
        self._control("limit-pages", {"jobs": jobs})

    def state(self) -> dict[str, Any]:
        """`accepted` and `orders`: account -> how many; `jobs`; `requests`: method, path, authorized, status."""
        return self._control("state")

    def accepted(self) -> dict[str, int]:
        """How often a job was accepted, by account: `SERVICE|PROMPT|SEED`, or the token where one is echoed."""
        return self.state()["accepted"]

    def _control(self, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.url}/_control/{name}", data, timeout=30) as answer:
            return json.loads(answer.read())


@contextmanager
def serving(folder: Path, video: str = VIDEO) -> Iterator[Provider]:
    """A provider in a process of its own, which ends with the block, or with this process; `folder` keeps videos."""
    command = [sys.executable, "-m", "tests.provider", "--folder", str(folder), "--video", video, "--until-eof"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"the fake provider did not start (exit code {process.wait()})")
        yield Provider(url)
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()
