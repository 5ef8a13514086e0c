"""The client of the teachers behind HTTP, against real servers whose answers a test writes down."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from afd_data.acceptance import RejectedError
from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.provider_config import ProviderConfig, TrafficConfig
from afd_data.teachers import FailedError, LostError, UnknownError, UnreachableError
from afd_data.teachers.http import Client, DeclinedError
from afd_data.video import write_mp4

KEY = "secret/key+0123456789"
SIGNED = "?X-Amz-Expires=9&X-Amz-Signature=deadbeef"


@dataclass
class Server:
    """Answers the requests of a path one after the other with what `script` holds for it; the last answer stays.

    The client under test is given `url`/v1.
    """

    url: str = ""
    script: dict[str, list[Callable[[BaseHTTPRequestHandler], None]]] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def count(self, path: str) -> int:
        """How often a path, without query, was asked for."""
        return sum(1 for _, seen, _, _ in self.seen if seen.partition("?")[0] == path)


@pytest.fixture
def server() -> Iterator[Server]:
    yield from _served()


@pytest.fixture
def stranger() -> Iterator[Server]:
    yield from _served()


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("A_KEY", KEY)
    return Client(_config(f"{server.url}/v1"))


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of 12 frames of noise, 32 x 32."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    write_mp4(path, frames, VideoConfig(width=32, height=32, frames=12, fps=8.0))
    return path.read_bytes()


def test_an_order_returns_the_json_and_sends_the_key(server: Server, client: Client):
    server.script["/v1/jobs"] = [_say(200, {"id": "7"})]
    assert client.order("jobs", {"prompt": "p"}, headers={"Idempotency-Key": "t"}) == {"id": "7"}
    method, _, headers, body = server.seen[0]
    assert (method, json.loads(body)) == ("POST", {"prompt": "p"})
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Idempotency-Key"] == "t"


def test_fields_are_sent_as_multipart(server: Server, client: Client):
    server.script["/v1/jobs"] = [_say(200, {})]
    client.order("jobs", fields={"prompt": "p"})
    _, _, headers, body = server.seen[0]
    assert headers["Content-Type"].startswith("multipart/form-data")
    assert b'name="prompt"\r\n\r\np\r\n' in body


@pytest.mark.parametrize("status", [300, 302, 303, 408, 409, 500, 502, 503, 504])
def test_an_order_that_may_have_been_taken_is_never_sent_again(server: Server, client: Client, status: int):
    server.script["/v1/jobs"] = [_say(status, {"error": "x"}, **{"Retry-After": "0"})]
    with pytest.raises(UnknownError):
        client.order("jobs", {})
    assert server.count("/v1/jobs") == 1


def test_an_order_whose_answer_is_lost_is_never_sent_again(server: Server, client: Client):
    server.script["/v1/jobs"] = [_drop]
    with pytest.raises(UnknownError):
        client.order("jobs", {})
    assert server.count("/v1/jobs") == 1


def test_an_order_that_is_answered_too_late_is_never_sent_again(server: Server, client: Client):
    late = threading.Event()

    def wait(_: BaseHTTPRequestHandler) -> None:
        late.wait(5)

    server.script["/v1/jobs"] = [wait]
    with pytest.raises(UnknownError, match="timed out"):
        client.order("jobs", {})
    late.set()
    assert server.count("/v1/jobs") == 1


def test_an_order_answered_with_a_page_is_unknown(server: Server, client: Client):
    server.script["/v1/jobs"] = [_raw(200, b"<html>Log in</html>")]
    with pytest.raises(UnknownError, match="not a JSON object"):
        client.order("jobs", {})


def test_an_order_is_sent_again_after_429(server: Server, client: Client):
    server.script["/v1/jobs"] = [_say(429, {}, **{"Retry-After": "0"})] * 2 + [_say(200, {"id": "7"})]
    assert client.order("jobs", {}) == {"id": "7"}
    assert server.count("/v1/jobs") == 3


def test_an_order_that_is_always_too_many_has_failed(server: Server, client: Client):
    server.script["/v1/jobs"] = [_say(429, {"error": "quota"}, **{"Retry-After": "0"})]
    with pytest.raises(FailedError, match=r"3 tries.*quota"):
        client.order("jobs", {})
    assert server.count("/v1/jobs") == 3


def test_a_refused_connection_is_tried_again_and_then_has_failed(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FailedError, match="not ordered after 3 tries"):
        Client(_config(f"http://127.0.0.1:{port}/v1")).order("jobs", {})


def test_a_host_without_an_address_was_not_ordered_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", KEY)
    with pytest.raises(FailedError):
        Client(_config("https://no-such-host.invalid/v1")).order("jobs", {})


def test_a_proxy_that_is_not_there_was_not_ordered_through(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(FailedError):
        client.order("jobs", {})


def test_a_certificate_that_is_not_trusted_ends_the_order_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("A_KEY", KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_self_signed(tmp_path / "localhost.pem"))
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def serve() -> None:
            for _ in range(3):
                connection, _ = plain.accept()
                with connection, contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(FailedError, match="CERTIFICATE_VERIFY_FAILED"):
            Client(_config(f"https://127.0.0.1:{plain.getsockname()[1]}")).order("jobs", {})
        thread.join()


def test_the_environment_says_which_hosts_need_no_proxy(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.script["/v1/jobs"] = [_say(200, {"id": "7"})]
    assert client.order("jobs", {}) == {"id": "7"}


def test_a_declined_order_tells_status_and_body(server: Server, client: Client):
    server.script["/v1/jobs"] = [_say(422, {"error": {"code": "bad"}})]
    with pytest.raises(DeclinedError) as caught:
        client.order("jobs", {})
    assert (caught.value.status, caught.value.body) == (422, {"error": {"code": "bad"}})


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_redirected_order_is_not_followed(server: Server, client: Client, stranger: Server, status: int):
    server.script["/v1/jobs"] = [_raw(status, b"", Location=f"{stranger.url}/jobs")]
    with pytest.raises(UserError, match=r"teacher\.base_url"):
        client.order("jobs", {})
    assert stranger.seen == []


def test_a_question_is_asked_again_after_errors(server: Server, client: Client):
    server.script["/v1/jobs/7"] = [_say(500, {}, **{"Retry-After": "0"}), _drop, _say(200, {"state": "ready"})]
    assert client.ask("jobs/7") == {"state": "ready"}


def test_a_question_without_an_answer_is_unreachable(server: Server, client: Client):
    server.script["/v1/jobs/7"] = [_say(503, {}, **{"Retry-After": "0"})]
    with pytest.raises(UnreachableError, match="after 3 tries"):
        client.ask("jobs/7")
    assert server.count("/v1/jobs/7") == 3


def test_a_forgotten_job_is_lost(server: Server, client: Client):
    server.script["/v1/jobs/7"] = [_say(404, {"error": "no such job"})]
    with pytest.raises(LostError, match="no such job"):
        client.ask("jobs/7")


def test_a_404_that_is_a_page_means_the_address_and_not_the_job(server: Server, client: Client):
    server.script["/v1/jobs/7"] = [_raw(404, b"<html>nginx</html>")]
    with pytest.raises(UserError, match=r"teacher\.base_url"):
        client.ask("jobs/7")


def test_a_wrong_key_names_the_variable(server: Server, client: Client):
    server.script["/v1/jobs/7"] = [_say(401, {"error": f"wrong key {KEY}"})]
    with pytest.raises(UserError, match="A_KEY") as caught:
        client.ask("jobs/7")
    assert KEY not in str(caught.value)


def test_retry_after_is_waited_for_but_not_longer_than_the_recipe_says(server: Server):
    client = Client(_config(f"{server.url}/v1", key=None, longest_wait_s=0.3))
    server.script["/v1/jobs"] = [_say(429, {}, **{"Retry-After": s}) for s in ("0.2", "3600")] + [_say(200, {})]
    begin = time.monotonic()
    client.order("jobs", {})
    assert 0.5 <= time.monotonic() - begin < 1.0


def test_what_one_order_is_told_by_429_all_others_wait_for(server: Server):
    client = Client(_config(f"{server.url}/v1", key=None, attempts=1, longest_wait_s=1.0))
    server.script["/v1/jobs"] = [_say(429, {}, **{"Retry-After": "0.2"})]
    with pytest.raises(FailedError):
        client.order("jobs", {})
    begin = time.monotonic()
    assert client.turn(threading.Event())
    assert 0.15 <= time.monotonic() - begin < 0.9


def test_a_stop_while_an_order_waits_to_be_sent_again_ends_it_unordered(server: Server):
    client, stop = Client(_config(f"{server.url}/v1", key=None, longest_wait_s=60.0)), threading.Event()
    server.script["/v1/jobs"] = [_say(429, {"error": "quota"}, **{"Retry-After": "60"})]
    assert client.turn(stop)
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(FailedError, match=r"stopped before it was ordered: 429 .*quota"):
        client.order("jobs", {})
    assert server.count("/v1/jobs") == 1
    assert not client.turn(stop)


def test_no_more_orders_does_not_mean_that_jobs_are_left_alone(
    server: Server, client: Client, tmp_path: Path, mp4: bytes
):
    stop = threading.Event()
    stop.set()
    assert not client.turn(stop)
    server.script |= {"/v1/jobs/7": [_say(503, {}), _say(200, {"id": "7"})], "/v1/a": [_raw(503, b""), _raw(200, mp4)]}
    assert client.ask("jobs/7") == {"id": "7"}
    client.download(lambda: "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4


def test_an_answer_can_always_be_written_down(server: Server, client: Client):
    body = b'{"prompt": "a dog \\ud83d", "cost": NaN, "price": 1e400, "whole": "\\ud83d\\ude00"}'
    server.script["/v1/jobs/7"] = [_raw(200, body)]
    assert client.ask("jobs/7") == {"prompt": "a dog ?", "cost": None, "price": None, "whole": "\U0001f600"}
    assert client.clean("half \ud83d") == "half ?"


def test_a_video_is_downloaded(server: Server, client: Client, tmp_path: Path, mp4: bytes):
    server.script["/v1/jobs/7/content"] = [_raw(200, mp4)]
    client.download(lambda: "jobs/7/content", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_stranger_gets_no_key(client: Client, stranger: Server, tmp_path: Path, mp4: bytes):
    stranger.script["/a.mp4"] = [_raw(200, mp4)]
    client.download(lambda: f"{stranger.url}/a.mp4{SIGNED}", tmp_path / "a")
    assert "Authorization" not in stranger.seen[0][2]


def test_a_redirected_download_takes_no_key_along(
    server: Server, client: Client, stranger: Server, tmp_path: Path, mp4: bytes
):
    server.script["/v1/jobs/7/content"] = [_raw(302, b"", Location=f"{stranger.url}/a.mp4")]
    stranger.script["/a.mp4"] = [_raw(200, mp4)]
    client.download(lambda: "jobs/7/content", tmp_path / "a")
    assert "Authorization" not in stranger.seen[0][2]


def test_the_key_goes_to_no_absolute_address(client: Client, stranger: Server):
    with pytest.raises(AssertionError):
        client.ask(f"{stranger.url}/jobs/7")


def test_a_login_in_netrc_does_not_replace_the_key(
    server: Server, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.script["/v1/jobs/7"] = [_say(200, {})]
    client.ask("jobs/7")
    assert server.seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_a_page_instead_of_a_video_is_fetched_again(server: Server, client: Client, tmp_path: Path, mp4: bytes):
    server.script["/v1/a"] = [_raw(200, b"<!DOCTYPE html><html>Log in</html>"), _raw(200, mp4)]
    client.download(lambda: "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4


def test_a_page_that_stays_is_named(server: Server, client: Client, tmp_path: Path):
    server.script["/v1/a"] = [_raw(200, b"<!DOCTYPE html><html>Log in</html>")]
    with pytest.raises(UnreachableError, match="an HTML page"):
        client.download(lambda: "a", tmp_path / "a")
    assert server.count("/v1/a") == 3


@pytest.mark.parametrize("sized", [True, False], ids=["with its length", "without a length"])
def test_a_truncated_video_is_fetched_again(server: Server, client: Client, tmp_path: Path, mp4: bytes, sized: bool):
    server.script["/v1/a"] = [_cut(mp4, len(mp4) * 2 // 3, sized), _raw(200, mp4)]
    client.download(lambda: "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4
    assert server.count("/v1/a") == 2


def test_a_busy_store_is_asked_again_when_it_says(server: Server, client: Client, tmp_path: Path, mp4: bytes):
    server.script["/v1/a"] = [_raw(503, b"", **{"Retry-After": "0"}), _raw(429, b"", **{"Retry-After": "0"})]
    server.script["/v1/a"].append(_raw(200, mp4))
    client.download(lambda: "a", tmp_path / "a")
    assert server.count("/v1/a") == 3


def test_an_expired_address_is_asked_for_anew(client: Client, stranger: Server, tmp_path: Path, mp4: bytes):
    stranger.script |= {"/old": [_raw(403, b"expired")], "/new": [_raw(200, mp4)]}
    addresses = iter([f"{stranger.url}/old", f"{stranger.url}/new"])
    client.download(lambda: next(addresses), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4


def test_a_video_that_is_gone_at_every_address_is_lost(client: Client, stranger: Server, tmp_path: Path):
    stranger.script["/a"] = [_raw(404, b"")]
    with pytest.raises(LostError):
        client.download(lambda: f"{stranger.url}/a", tmp_path / "a")
    assert stranger.count("/a") == 3


def test_a_video_that_comes_back_after_two_refusals_is_taken(
    client: Client, stranger: Server, tmp_path: Path, mp4: bytes
):
    stranger.script["/a"] = [_raw(403, b""), _raw(403, b""), _raw(200, mp4)]
    client.download(lambda: f"{stranger.url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4


def test_what_comes_whole_every_time_and_is_no_video_is_rejected(
    server: Server, client: Client, tmp_path: Path, mp4: bytes
):
    server.script["/v1/a"] = [_raw(200, mp4[: len(mp4) // 2])]
    with pytest.raises(RejectedError, match=r"^undecodable: "):
        client.download(lambda: "a", tmp_path / "a")
    assert server.count("/v1/a") == 3


@pytest.mark.parametrize("body", [b"", b'{"error": "busy"}', b"\n<html>"])
def test_an_empty_answer_and_a_page_say_nothing_of_the_video(
    server: Server, client: Client, tmp_path: Path, body: bytes
):
    server.script["/v1/a"] = [_raw(200, body)]
    with pytest.raises(UnreachableError):
        client.download(lambda: "a", tmp_path / "a")


def test_what_never_says_its_length_may_be_cut_short(server: Server, client: Client, tmp_path: Path, mp4: bytes):
    server.script["/v1/a"] = [_cut(mp4, len(mp4) // 2, sized=False)]
    with pytest.raises(UnreachableError):
        client.download(lambda: "a", tmp_path / "a")


@pytest.mark.parametrize("address", ["http://[bad", "file:///etc/passwd", "http://h:port/a"])
def test_an_address_of_a_video_that_is_none_is_unreachable(client: Client, tmp_path: Path, address: str):
    with pytest.raises(UnreachableError):
        client.download(lambda: address, tmp_path / "a")


def test_an_expired_address_does_not_use_up_the_only_try(server: Server, tmp_path: Path, mp4: bytes):
    server.script["/v1/a"] = [_raw(410, b""), _raw(200, mp4)]
    once = Client(_config(f"{server.url}/v1", key=None, attempts=1))
    once.download(lambda: "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mp4


def test_a_video_that_is_too_large_is_broken_off(server: Server, tmp_path: Path, mp4: bytes):
    server.script["/v1/a"] = [_raw(200, mp4)]
    with pytest.raises(UserError, match="max_video_mb"):
        Client(_config(f"{server.url}/v1", key=None, max_video_mb=1e-3)).download(lambda: "a", tmp_path / "a")


def test_no_error_holds_the_key_or_a_signed_query(client: Client):
    texts = [
        f"HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /a.mp4{SIGNED} (Caused by X)",
        f'{{"url": "https://h/a.mp4{SIGNED}", "key": "{KEY}"}}',
        f"https:\\/\\/h\\/a.mp4{SIGNED}\\u0026b=1",
        "key secret%2Fkey%2B0123456789 and secret\\/key+0123456789",
        "http://user:pass@h/a",
    ]
    cleaned = " ".join(client.clean(text) for text in texts)
    for secret in ("deadbeef", "0123456789", "user:pass"):
        assert secret not in cleaned


def test_an_unreachable_signed_address_is_not_told(server: Server, client: Client, tmp_path: Path):
    with pytest.raises(UnreachableError) as caught:
        client.download(lambda: f"http://127.0.0.1:1/a.mp4{SIGNED}", tmp_path / "a")
    assert "a.mp4" in str(caught.value)
    assert "deadbeef" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("address", ["ftp://h", "h/v1", "http://", "http://h:port"])
def test_an_address_that_is_none_is_a_user_error(address: str):
    with pytest.raises(UserError, match=r"teacher\.base_url"):
        Client(_config(address, key=None))


@pytest.mark.parametrize("host", ["api.example.com", "8.8.8.8", "[2001:4860:4860::8888]"])
def test_the_key_does_not_go_to_a_public_host_in_plain_text(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", KEY)
    with pytest.raises(UserError, match=r"teacher\.base_url: .* plain text. Write https://"):
        Client(_config(f"http://{host}/v1"))
    Client(_config(f"https://{host}/v1"))
    Client(_config(f"http://{host}/v1", key=None))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "10.1.2.3", "192.168.0.9", "node7", "gpu.local"])
def test_the_key_goes_to_hosts_nearby_in_plain_text(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", KEY)
    Client(_config(f"http://{host}:8000/v1"))


def test_a_login_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="environment variable") as caught:
        Client(_config("https://user:pass@h/v1", key=None))
    assert "pass@" not in str(caught.value)


@pytest.mark.parametrize("value", ["", " ", "two\nlines", "schl\u00fcssel"])
def test_a_key_that_is_none_names_its_variable_only(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(UserError, match="A_KEY") as caught:
        Client(_config("http://h/v1"))
    assert not value.strip() or value not in str(caught.value)


def _config(url: str, key: str | None = "A_KEY", **traffic: float) -> ProviderConfig:
    limits = {"timeout_s": 0.3, "attempts": 3, "longest_wait_s": 0.02} | traffic
    return ProviderConfig(base_url=url, key_variable=key, traffic=TrafficConfig.model_validate(limits))


def _self_signed(path: Path) -> Path:
    """Write a key and a certificate of nobody's authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


def _served() -> Iterator[Server]:
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.seen.append((self.command, self.path, dict(self.headers), body))
            answers = served.script[self.path.partition("?")[0]]
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        served.url = f"http://127.0.0.1:{http.server_port}"
        yield served
        http.shutdown()


def _raw(status: int, body: bytes, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def _say(status: int, body: object, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return _raw(status, json.dumps(body).encode(), **headers)


def _cut(body: bytes, end: int, sized: bool) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if sized:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:end])
        handler.close_connection = True

    return answer


def _drop(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
