"""What the teachers behind HTTP share, and what they make of answers that no service gives on a good day."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf

import pytest

from afd_data.config import VideoConfig
from afd_data.provider_config import ArkConfig, FalConfig, TrafficConfig, VideosConfig
from afd_data.teachers import FailedError, LostError, RefusedError, Request, UnknownError, UnreachableError
from afd_data.teachers.ark import Ark
from afd_data.teachers.fal import Fal, queue_of
from afd_data.teachers.provider import expiry, is_refusal, number, order_of, seconds
from afd_data.teachers.videos import Videos

NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z
REQUEST = Request("f" * 64, "p", "a ball", 0, 5, VideoConfig(width=64, height=48, frames=24, fps=12.0))
TRAFFIC = TrafficConfig(attempts=1, timeout_s=5.0, longest_wait_s=0.01)
Answering = Callable[..., str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """`answering(body, status=200)` -> the address of a server that says this to whatever it is asked from now on."""
    said: list[tuple[int, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = said[-1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()

        def start(body: object, status: int = 200) -> str:
            said.append((status, json.dumps(body).encode()))
            return f"http://127.0.0.1:{http.server_port}/v1"

        yield start
        http.shutdown()


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "InputTextSensitiveContentDetected", "message": "Sorry."}},
        {"error": {"code": "moderation_blocked", "type": "invalid_request_error", "message": "Blocked."}},
        {"detail": [{"loc": ["body", "prompt"], "msg": "No.", "type": "content_policy_violation"}]},
        {"failureCode": "SAFETY.INPUT.TEXT", "failure": "No."},
        {"error": {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}},
        {"detail": "blocked by the content filter"},
        "rejected by the moderation filter",
    ],
)
def test_moderation_is_recognised_however_a_service_words_it(body: object):
    assert is_refusal(body)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "InvalidParameter", "message": "the prompt 'a safety belt' is too long"}},
        {"detail": [{"loc": ["body", "prompt"], "msg": "field required", "type": "missing"}]},
        {"error": "Validation of body failed"},
        {},
        None,
        5,
    ],
)
def test_other_errors_are_no_refusals(body: object):
    assert not is_refusal(body)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("X-Amz-Date=20261123T110000Z&X-Amz-Expires=3600&X-Amz-Signature=s", NOON),
        ("x-tos-date=20261123T110000Z&x-tos-expires=3600", NOON),
        ("X-Goog-Date=20261123T110000Z&X-Goog-Expires=3600", NOON),
        ("Expires=1795435200&Signature=s", NOON),
        ("se=2026-11-23T12%3A00%3A00Z&sig=s", NOON),
        ("X-Amz-Date=yesterday&X-Amz-Expires=3600", inf),
        ("X-Amz-Date=20261123T110000Z", inf),
        ("se=later", inf),
        ("Expires=\u00b2", inf),
        ("X-Amz-Date=20261123T110000Z&X-Amz-Expires=nan", inf),
        ("", inf),
    ],
)
def test_a_signed_address_says_when_it_expires(query: str, expected: float):
    assert expiry(f"https://h/a.mp4?{query}") == expected


def test_an_address_that_is_none_never_expires():
    assert expiry("http://[bad") == inf


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0, 10**400, True, "1", None])
def test_a_cost_that_is_no_number_is_not_told(cost: object):
    assert number({"cost": cost}, "cost") is None


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (1795435200, NOON),
        ("2026-11-23T12:00:00Z", NOON),
        ("2026-11-23T13:00:00+01:00", NOON),
        (None, None),
        ("x", None),
        (float("nan"), None),
        (10**400, None),
        ("0001-01-01T00:00:00", None),
    ],
)
def test_moments_are_numbers_or_texts(moment: object, expected: float | None):
    assert seconds(moment) == expected


def test_options_win_and_none_leaves_a_field_out():
    assert order_of({"a": 1, "b": 2, "c": None}, {"b": None, "d": 4}) == {"a": 1, "d": 4}


@pytest.mark.parametrize(
    ("app", "queue"),
    [
        ("bytedance/seedance-2.0/text-to-video", "bytedance/seedance-2.0"),
        ("fal-ai/veo3", "fal-ai/veo3"),
        ("workflows/me/mine", "workflows/me/mine"),
    ],
)
def test_a_queue_is_named_by_owner_and_app(app: str, queue: str):
    assert queue_of(app) == queue


def test_an_unknown_word_is_never_taken_for_ready(answering: Answering):
    videos = Videos(VideosConfig(base_url=answering({"id": "7", "status": "baking"}), traffic=TRAFFIC))
    with pytest.raises(UnreachableError, match=r"'baking'.*teacher\.states"):
        videos.poll("7")


@pytest.mark.parametrize("meaning", ["queued", "running", "ready"])
def test_the_recipe_can_say_what_a_word_means(answering: Answering, meaning: str):
    base_url = answering({"id": "7", "status": "baking"})
    config = {"base_url": base_url, "traffic": TRAFFIC, "states": {"baking": meaning}}
    assert Videos(VideosConfig.model_validate(config)).poll("7").state == meaning


def test_a_word_that_means_refused_is_a_refusal(answering: Answering):
    base_url = answering({"id": "7", "status": "blocked", "error": {"code": "E7", "message": "no"}})
    with pytest.raises(RefusedError, match="E7: no"):
        Videos(VideosConfig(base_url=base_url, traffic=TRAFFIC, states={"blocked": "refused"})).poll("7")


def test_an_accepted_order_without_an_id_is_unknown(answering: Answering):
    videos = Videos(VideosConfig(base_url=answering({"status": "queued"}), traffic=TRAFFIC))
    with pytest.raises(UnknownError, match="no 'id'"):
        videos.submit(REQUEST)


def test_a_job_that_was_just_taken_may_be_unknown_for_a_moment(answering: Answering):
    videos = Videos(VideosConfig(base_url=answering({"id": "7"}), traffic=TRAFFIC))
    assert videos.submit(REQUEST) == "7"
    answering({"error": "no such job"}, 404)
    assert videos.poll("7").state == "queued"
    answering({"id": "7", "status": "running"})
    assert videos.poll("7").state == "running"
    answering({"error": "no such job"}, 404)
    with pytest.raises(LostError):
        videos.poll("7")


def test_a_job_that_stays_unknown_for_a_minute_is_lost(answering: Answering, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("afd_data.teachers.provider.YOUNG_S", 0.0)
    videos = Videos(VideosConfig(base_url=answering({"id": "7"}), traffic=TRAFFIC))
    videos.submit(REQUEST)
    answering({"error": "no such job"}, 404)
    with pytest.raises(LostError):
        videos.poll("7")


def test_a_failure_whose_cost_is_not_told_may_have_been_charged(answering: Answering):
    videos = Videos(VideosConfig(base_url=answering({"id": "7", "status": "failed"}), traffic=TRAFFIC))
    with pytest.raises(FailedError) as caught:
        videos.poll("7")
    assert caught.value.cost is None


def test_a_late_refusal_whose_cost_is_not_told_may_have_been_charged(answering: Answering):
    base_url = answering({"status": "COMPLETED", "error_type": "content_policy_violation"})
    fal = Fal(FalConfig(base_url=base_url, key_variable=None, app="a/b", traffic=TRAFFIC))
    with pytest.raises(RefusedError) as caught:
        fal.poll("7")
    assert caught.value.cost is None


@pytest.mark.parametrize(("usage", "cost"), [(None, 0.0), ({"completion_tokens": 0}, 0.0),
                                             ({"completion_tokens": 500_000}, 1.0)])  # fmt: skip
def test_a_failure_at_ark_costs_the_tokens_that_it_tells(answering: Answering, usage: dict | None, cost: float):
    base_url = answering({"id": "7", "status": "failed", "usage": usage})
    config = ArkConfig(base_url=base_url, key_variable=None, model="m", price_per_million_tokens=2.0, traffic=TRAFFIC)
    with pytest.raises(FailedError) as caught:
        Ark(config).poll("7")
    assert caught.value.cost == cost


@pytest.mark.parametrize("items", [[{"status": "queued"}], ["x"], {"id": "7"}, [{"id": 7}]])
def test_a_list_of_jobs_that_is_not_readable_proves_nothing(answering: Answering, items: object):
    ark = Ark(ArkConfig(base_url=answering({"items": items}), key_variable=None, model="m", traffic=TRAFFIC))
    with pytest.raises(UnreachableError, match="proves nothing"):
        list(ark.jobs(time.time()))


def test_a_service_that_knows_no_pages_is_read_once(answering: Answering):
    items = [{"id": str(number), "created_at": time.time(), "safety_identifier": None} for number in range(3)]
    ark = Ark(ArkConfig(base_url=answering({"items": items}), key_variable=None, model="m", traffic=TRAFFIC))
    assert [(job.job_id, job.token) for job in ark.jobs(time.time())] == [("0", ""), ("1", ""), ("2", "")]


def test_a_failed_job_without_a_reason_is_named_by_its_state(answering: Answering):
    videos = Videos(VideosConfig(base_url=answering({"id": "7", "status": "expired"}), traffic=TRAFFIC))
    with pytest.raises(FailedError, match="expired"):
        videos.poll("7")


def test_a_reason_is_told_without_the_query_of_an_address(answering: Answering):
    error = {"code": "E7", "message": "could not read https://h/a.png?X-Amz-Signature=deadbeef"}
    videos = Videos(VideosConfig(base_url=answering({"status": "failed", "error": error}), traffic=TRAFFIC))
    with pytest.raises(FailedError) as caught:
        videos.poll("7")
    assert str(caught.value) == "E7: could not read https://h/a.png"


def test_the_first_of_several_videos_is_taken(answering: Answering):
    answer = {"status": "COMPLETED", "videos": [{"url": "https://h/1.mp4"}, {"url": "https://h/2.mp4"}]}
    fal = Fal(FalConfig(base_url=answering(answer), key_variable=None, app="a/b", traffic=TRAFFIC))
    assert fal.look("7").address == "https://h/1.mp4"


def test_a_gateway_of_an_unknown_kind_is_taken_for_paid_unless_the_recipe_says_otherwise():
    kinds = [("generic", None), ("generic", False), ("sglang", None), ("sglang", True), ("openrouter", None)]
    paid = [
        Videos(VideosConfig.model_validate({"base_url": "http://h", "dialect": d, "paid": p})).identity.paid
        for d, p in kinds
    ]
    assert paid == [True, False, False, True, True]
