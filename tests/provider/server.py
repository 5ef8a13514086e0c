"""HTTP of the fake provider: finds the service, sends or spoils its answer, and obeys `/_control/`."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.provider import ark, fal, openrouter, runway, storage, videos
from tests.provider.footage import parse_video
from tests.provider.shop import Dropped, Service, Shop, Trouble
from tests.provider.wire import Answer, Question, say

SERVICES: dict[str, Service] = videos.SERVICES | {
    "ark": ark.SERVICE,
    "fal": fal.SERVICE,
    "openrouter": openrouter.SERVICE,
    "runway": runway.SERVICE,
}


class Server(ThreadingHTTPServer):
    """Serves `shop` on loopback, a thread a connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, shop: Shop, port: int) -> None:
        super().__init__(("127.0.0.1", port), lambda *connection: Handler(shop, *connection))


def listen(shop: Shop, port: int = 0) -> Server:
    """A server that listens; `serve_forever` starts it."""
    return Server(shop, port)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = 65536  # an answer in few packets, so that no delayed acknowledgement holds it up
    disable_nagle_algorithm = True

    def __init__(self, shop: Shop, *connection: Any) -> None:
        self._shop = shop
        super().__init__(*connection)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client was killed; that is what it is for

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests read `state` instead."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        origin = f"http://{headers.get('host', '127.0.0.1')}"
        if url.path.startswith("/_control/"):
            self._send(_control(self._shop, url.path.removeprefix("/_control/"), body))
            return
        question = Question(self.command or "", url.path, parse_qs(url.query), headers, body, origin)
        answer = _answer_of(self._shop, question)
        with self._shop.lock:
            self._shop.requests.append(
                {"method": question.method, "path": question.path, "authorized": "authorization" in headers,
                 "host": origin.removeprefix("http://").partition(":")[0],
                 "status": answer.status if answer.fate != "none" else None}
            )  # fmt: skip
        self._send(answer)

    do_GET = do_POST = do_DELETE = do_PUT = _answer

    def _send(self, answer: Answer) -> None:
        if answer.fate == "none":
            self._hang_up()
            return
        self.send_response(answer.status)
        for name, value in {"Content-Type": answer.kind, **answer.headers}.items():
            self.send_header(name, value)
        if answer.fate == "unsized":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        whole = answer.fate == "sent"
        self.wfile.write(answer.body if whole else answer.body[: len(answer.body) // 2])
        self.wfile.flush()
        if not whole:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may have gone before
            self.connection.shutdown(socket.SHUT_RDWR)


def _answer_of(shop: Shop, question: Question) -> Answer:
    name, _, path = question.path.lstrip("/").partition("/")
    if name == "files":
        return storage.download(shop, question)
    service = SERVICES.get(name)
    if service is None:
        return say(404, {"error": "no such service"})
    below = Question(question.method, f"/{path}", question.query, question.headers, question.body, question.origin)
    try:
        return service.answer(shop, below)
    except Trouble as trouble:
        return service.errors[trouble.kind]
    except ValueError:  # a number that is none
        return service.errors["invalid"]
    except Dropped:
        return Answer(fate="none")


def _control(shop: Shop, name: str, body: bytes) -> Answer:
    match name:
        case "state":
            return say(200, shop.state())
        case "reset":
            shop.reset()
            shop.footage.video = parse_video(json.loads(body)["video"])
        case "forget":
            with shop.lock:
                shop.jobs.clear()
        case "limit-pages":
            shop.longest_page = json.loads(body)["jobs"]
        case _:
            return say(404, {"error": f"no such control: {name}"})
    return say(200, {})
