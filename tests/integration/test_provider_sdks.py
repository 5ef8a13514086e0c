"""The services' official clients buy from the fake provider: what it speaks is what they understand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fal_client
import fal_client.client
import openai
import pytest
import requests
import runwayml
import volcenginesdkarkruntime as ark
from volcenginesdkarkruntime._exceptions import ArkAuthenticationError, ArkBadRequestError, ArkNotFoundError

from afd_data.video import read_video
from tests.provider import TEST_KEY, Provider

APP = "bytedance/seedance-2.0/text-to-video"


@dataclass(frozen=True)
class Customer:
    """An official client with its default settings: order -> job id, wait -> mp4, and its classes of errors."""

    order: Callable[[str], str]
    video: Callable[[str], bytes]
    refused: type[Exception]
    unwelcome: type[Exception]


def ark_customer(base: str, key: str) -> Customer:
    tasks = ark.Ark(api_key=key, base_url=base).content_generation.tasks

    def order(prompt: str) -> str:
        return tasks.create(model="seedance", content=[{"type": "text", "text": prompt}], seed=7).id

    def video(task_id: str) -> bytes:
        task = waited(lambda: tasks.get(task_id=task_id), lambda task: task.status in ("queued", "running"))
        return fetched(task.content.video_url)

    return Customer(order, video, ArkBadRequestError, ArkAuthenticationError)


def openai_customer(base: str, key: str) -> Customer:
    videos = openai.OpenAI(api_key=key, base_url=base).videos

    def video(video_id: str) -> bytes:
        waited(lambda: videos.retrieve(video_id), lambda job: job.status in ("queued", "in_progress"))
        return videos.download_content(video_id).read()

    def order(prompt: str) -> str:
        return videos.create(prompt=prompt, model="sora-2", extra_body={"seed": 7}).id

    return Customer(order, video, openai.BadRequestError, openai.AuthenticationError)


def fal_customer(base: str, key: str) -> Customer:
    client = fal_client.SyncClient(key=key)

    def order(prompt: str) -> str:
        return client.submit(APP, {"prompt": prompt, "seed": 7}).request_id

    def video(request_id: str) -> bytes:
        waited(lambda: client.status(APP, request_id), lambda status: not isinstance(status, fal_client.Completed))
        return fetched(client.result(APP, request_id)["video"]["url"])

    return Customer(order, video, fal_client.client.FalClientHTTPError, fal_client.client.FalClientHTTPError)


def runway_customer(base: str, key: str) -> Customer:
    client = runwayml.RunwayML(api_key=key, base_url=base)

    def order(prompt: str) -> str:
        return client.text_to_video.create(model="gen4.5", prompt_text=prompt, ratio="1280:720", duration=5, seed=7).id

    def video(task_id: str) -> bytes:
        task: Any = waited(lambda: client.tasks.retrieve(task_id), lambda task: task.status in ("PENDING", "RUNNING"))
        return fetched(task.output[0])

    return Customer(order, video, runwayml.BadRequestError, runwayml.AuthenticationError)


CUSTOMERS = {"ark": ark_customer, "videos": openai_customer, "fal": fal_customer, "runway": runway_customer}
every_service = pytest.mark.parametrize("service", CUSTOMERS)


def waited(ask: Callable[[], Any], goes_on: Callable[[Any], bool]) -> Any:
    """What `ask` answers once the job has ended."""
    until = time.monotonic() + 10
    while goes_on(answer := ask()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return answer


def fetched(url: str) -> bytes:
    answer = requests.get(url, timeout=10)
    assert answer.status_code == 200
    return answer.content


@pytest.fixture
def customer_of(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Customer]:
    # Its address is no setting of the client: only the host can be changed, not https.
    monkeypatch.setattr(fal_client.client, "QUEUE_URL_FORMAT", provider.base("fal") + "/")
    return lambda service, key=TEST_KEY: CUSTOMERS[service](provider.base(service), key)


@every_service
def test_a_client_completes_a_job_and_gets_a_video_that_decodes(
    service: str, provider: Provider, customer_of: Callable[..., Customer]
):
    customer = customer_of(service)
    mp4 = customer.video(customer.order("a ball rolls"))
    assert read_video(mp4).frames.shape == (24, 48, 64, 3)
    assert provider.accepted() == {f"{service}|a ball rolls|7": 1}


@every_service
def test_a_refusal_is_the_clients_own_error_and_nothing_is_accepted(
    service: str, provider: Provider, customer_of: Callable[..., Customer]
):
    customer = customer_of(service)
    with pytest.raises(customer.refused, match=r"moderation|sensitive|content checker"):
        customer.order("mode=refuse")
    assert provider.accepted() == {}


@every_service
def test_a_wrong_key_is_the_clients_own_error(service: str, provider: Provider, customer_of: Callable[..., Customer]):
    customer = customer_of(service, "wrong")
    with pytest.raises(customer.unwelcome) as caught:
        customer.order("a ball rolls")
    assert caught.value.status_code == 401  # pyright: ignore[reportAttributeAccessIssue]
    assert provider.state()["orders"] == {}


@every_service
def test_a_busy_service_takes_the_order_at_the_third_try(
    service: str, provider: Provider, customer_of: Callable[..., Customer]
):
    customer_of(service).order("mode=429")
    assert list(provider.state()["orders"].values()) == [3]
    assert list(provider.accepted().values()) == [1]


@pytest.mark.parametrize("service", ["ark", "videos", "runway"])
def test_after_a_500_a_clients_default_retries_buy_twice(
    service: str, provider: Provider, customer_of: Callable[..., Customer]
):
    customer_of(service).order("mode=500-after-accept")
    assert list(provider.accepted().values()) == [2]


def test_fals_client_does_not_retry_a_500(provider: Provider, customer_of: Callable[..., Customer]):
    with pytest.raises(fal_client.client.FalClientHTTPError, match="Internal Server Error"):
        customer_of("fal").order("mode=500-after-accept")
    assert list(provider.accepted().values()) == [1]


@every_service
def test_after_a_dropped_connection_a_clients_default_retries_buy_twice(
    service: str, provider: Provider, customer_of: Callable[..., Customer]
):
    customer_of(service).order("mode=drop-after-accept")
    assert list(provider.accepted().values()) == [2]


def test_ark_lists_tasks_by_state_and_echoes_token_and_seed(provider: Provider):
    tasks = ark.Ark(api_key=TEST_KEY, base_url=provider.base("ark")).content_generation.tasks
    ids = [
        tasks.create(
            model="m", content=[{"type": "text", "text": f"ball {n}"}], seed=n, safety_identifier=f"afd-{n}"
        ).id
        for n in range(3)
    ]
    for _ in range(2):
        tasks.get(task_id=ids[0])
    assert provider.accepted() == {"afd-0": 1, "afd-1": 1, "afd-2": 1}
    done = tasks.list(status="succeeded", page_num=1, page_size=10)
    assert [(task.id, task.safety_identifier, task.seed, task.usage.completion_tokens) for task in done.items] == [
        (ids[0], "afd-0", 0, 100_000)
    ]
    page = tasks.list(page_num=2, page_size=2)
    assert (page.total, [task.id for task in page.items]) == (3, [ids[0]])  # newest first
    assert [task.id for task in tasks.list(task_ids=ids[1:]).items] == [ids[2], ids[1]]


def test_ark_forgets_a_deleted_task(provider: Provider):
    tasks = ark.Ark(api_key=TEST_KEY, base_url=provider.base("ark")).content_generation.tasks
    task_id = tasks.create(model="m", content=[{"type": "text", "text": "a ball"}]).id
    waited(lambda: tasks.get(task_id=task_id), lambda task: task.status == "running")
    tasks.delete(task_id=task_id)
    with pytest.raises(ArkNotFoundError):
        tasks.get(task_id=task_id)


@pytest.mark.parametrize(
    ("mode", "code", "tokens"),
    [
        ("refuse-late", "OutputVideoSensitiveContentDetected", None),
        ("fail", "InternalServiceError", None),
        ("fail-after-billing", "InternalServiceError", 100_000),
    ],
)
def test_ark_says_why_a_task_failed_and_what_it_cost(mode: str, code: str, tokens: int | None, provider: Provider):
    tasks = ark.Ark(api_key=TEST_KEY, base_url=provider.base("ark")).content_generation.tasks
    task_id = tasks.create(model="m", content=[{"type": "text", "text": f"mode={mode}"}]).id
    task = waited(lambda: tasks.get(task_id=task_id), lambda task: task.status == "running")
    assert (task.status, task.error.code) == ("failed", code)
    assert (task.usage.completion_tokens if task.usage else None) == tokens


def test_openais_own_loop_waits_for_a_slow_video(provider: Provider):
    videos = openai.OpenAI(api_key=TEST_KEY, base_url=provider.base("videos")).videos
    video = videos.create_and_poll(prompt="mode=slow", model="sora-2", poll_interval_ms=100)
    assert (video.status, video.size, video.seconds) == ("completed", "64x48", "2")
    assert 8 <= provider.state()["jobs"][0]["polls"] <= 12  # about a second, in tenths


def test_openai_lists_all_pages_and_deletes(provider: Provider):
    videos = openai.OpenAI(api_key=TEST_KEY, base_url=provider.base("videos")).videos
    ids = [videos.create(prompt=f"ball {n}").id for n in range(3)]
    assert [video.id for video in videos.list(limit=2)] == ids[::-1]
    videos.delete(ids[0])
    assert [video.id for video in videos.list(order="asc")] == ids[1:]


def test_openai_says_why_a_video_failed(provider: Provider):
    videos = openai.OpenAI(api_key=TEST_KEY, base_url=provider.base("videos")).videos
    video = videos.create_and_poll(prompt="mode=refuse-late", poll_interval_ms=10)
    assert video.error
    assert (video.status, video.error.code) == ("failed", "moderation_blocked")


def test_fal_reports_a_queue_and_gives_a_refusal_as_the_result(customer_of: Callable[..., Customer]):
    order, client = customer_of("fal").order, fal_client.SyncClient(key=TEST_KEY)
    slow, refused = order("mode=slow"), order("mode=refuse-late")
    assert client.status(APP, slow) == fal_client.Queued(position=0)
    assert isinstance(client.status(APP, refused), fal_client.InProgress)
    with pytest.raises(fal_client.client.FalClientHTTPError) as caught:
        client.get_handle(APP, refused).get(interval=0.01)
    assert caught.value.response.json()["detail"][0]["type"] == "content_policy_violation"


def test_fal_names_the_error_of_a_failed_request(customer_of: Callable[..., Customer]):
    request_id, client = customer_of("fal").order("mode=fail"), fal_client.SyncClient(key=TEST_KEY)
    *_, last = client.get_handle(APP, request_id).iter_events(interval=0.01)
    assert isinstance(last, fal_client.Completed)
    assert last.error == "The runner failed"


@pytest.mark.parametrize(
    ("mode", "code", "credits"),
    [
        ("refuse-late", "SAFETY.INPUT.TEXT", 0),
        ("fail", "INTERNAL.BAD_OUTPUT.CODE01", 0),
        ("fail-after-billing", "INTERNAL.BAD_OUTPUT.CODE01", 25),
    ],
)
def test_runway_says_why_a_task_failed_and_what_it_cost(
    mode: str, code: str, credits: int, provider: Provider, customer_of: Callable[..., Customer]
):
    client = runwayml.RunwayML(api_key=TEST_KEY, base_url=provider.base("runway"))
    task_id = customer_of("runway").order(f"mode={mode}")
    task: Any = waited(lambda: client.tasks.retrieve(task_id), lambda task: task.status == "RUNNING")
    assert (task.status, task.failure_code, task.cost.credits) == ("FAILED", code, credits)


def test_runway_estimates_first_and_charges_in_the_end(provider: Provider):
    client = runwayml.RunwayML(api_key=TEST_KEY, base_url=provider.base("runway"))
    order: Any = client.text_to_video.create(model="gen4.5", prompt_text="a ball", ratio="1280:720", duration=5)
    assert order.estimated_cost.credits == 25
    task: Any = waited(lambda: client.tasks.retrieve(order.id), lambda task: task.status == "RUNNING")
    assert (task.status, task.cost.credits) == ("SUCCEEDED", 25)
