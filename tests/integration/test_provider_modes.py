"""What goes wrong at the fake provider goes wrong as its table says, whichever service is asked."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from typing import Any

import av
import pytest
import requests

from afd_data.acceptance import check_motion, is_twin, thumbnail
from afd_data.video import read_video
from tests.provider import TEST_KEY, Provider

HEADERS = {"Authorization": f"Bearer {TEST_KEY}"}
TASKS = "/contents/generations/tasks"


def order(provider: Provider, prompt: str, token: str = "afd-1", timeout: float = 10) -> requests.Response:
    """Order at Ark."""
    body = {"model": "m", "content": [{"type": "text", "text": prompt}], "safety_identifier": token}
    return requests.post(provider.base("ark") + TASKS, json=body, headers=HEADERS, timeout=timeout)


def ask(provider: Provider, task_id: str) -> requests.Response:
    return requests.get(f"{provider.base('ark')}{TASKS}/{task_id}", headers=HEADERS, timeout=10)


def address(provider: Provider, task_id: str) -> str:
    """Of a video that is ready at the next poll."""
    return ask(provider, task_id).json()["content"]["video_url"]


def running(provider: Provider, prompt: str) -> str:
    """The id of a task that was polled once."""
    task_id = order(provider, prompt).json()["id"]
    assert ask(provider, task_id).json()["status"] == "running"
    return task_id


def test_a_connection_is_dropped_before_the_first_order_is_taken(provider: Provider):
    with pytest.raises(requests.ConnectionError):
        order(provider, "mode=drop-before-accept")
    assert provider.accepted() == {}
    order(provider, "mode=drop-before-accept")
    assert provider.accepted() == {"afd-1": 1}


@pytest.mark.parametrize("mode", ["drop-after-accept", "timeout-after-accept"])
def test_an_order_whose_answer_never_came_is_taken_and_listed(mode: str, provider: Provider):
    with pytest.raises((requests.ConnectionError, requests.ReadTimeout)):
        order(provider, f"mode={mode}", timeout=0.2)
    listed = requests.get(provider.base("ark") + TASKS, headers=HEADERS, timeout=10).json()
    assert [task["safety_identifier"] for task in listed["items"]] == ["afd-1"]


@pytest.mark.parametrize("mode", ["drop-after-accept", "timeout-after-accept", "500-after-accept"])
def test_a_second_order_is_answered_and_counted(mode: str, provider: Provider):
    with suppress(requests.RequestException):
        assert order(provider, f"mode={mode}", timeout=0.2).status_code == 500
    assert order(provider, f"mode={mode}").status_code == 200
    assert provider.accepted() == {"afd-1": 2}


def test_a_busy_service_says_when_to_come_back(provider: Provider):
    answer = order(provider, "mode=429")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "0")


def test_a_new_address_works_where_the_first_has_expired(provider: Provider):
    task_id = running(provider, "mode=expired")
    first, second = address(provider, task_id), address(provider, task_id)
    assert [requests.get(url, timeout=10).status_code for url in (first, first, second)] == [403, 403, 200]


def test_no_address_of_a_video_works_that_is_gone(provider: Provider):
    task_id = running(provider, "mode=gone")
    assert [requests.get(address(provider, task_id), timeout=10).status_code for _ in range(2)] == [404, 404]


def test_an_address_is_signed_and_needs_no_key(provider: Provider):
    url = address(provider, running(provider, "a ball"))
    assert requests.get(url[:-1] + "?", timeout=10).status_code == 403
    assert requests.get(url, headers=HEADERS, timeout=10).status_code == 400
    assert requests.get(url, timeout=10).headers["Content-Type"] == "video/mp4"


def test_a_download_ends_in_the_middle_only_once(provider: Provider):
    url = address(provider, running(provider, "mode=truncated"))
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        requests.get(url, timeout=10)
    assert len(read_video(requests.get(url, timeout=10).content).frames) == 24


def test_a_download_ends_in_the_middle_without_saying_so(provider: Provider):
    url = address(provider, running(provider, "mode=truncated-silently"))
    first, second = requests.get(url, timeout=10), requests.get(url, timeout=10)
    assert "Content-Length" not in first.headers
    assert first.content == second.content[: len(second.content) // 2]


def test_a_web_page_comes_instead_of_the_video_only_once(provider: Provider):
    url = address(provider, running(provider, "mode=html"))
    first, second = requests.get(url, timeout=10), requests.get(url, timeout=10)
    assert (first.status_code, first.content[:15], second.content[4:8]) == (200, b"<!DOCTYPE html>", b"ftyp")


def test_a_job_is_forgotten_from_the_second_poll_on(provider: Provider):
    task_id = running(provider, "mode=forgets")
    assert [ask(provider, task_id).status_code for _ in range(2)] == [404, 404]


def test_the_first_get_of_every_address_fails(provider: Provider):
    task_id = order(provider, "mode=flaky").json()["id"]
    assert [ask(provider, task_id).status_code for _ in range(3)] == [500, 200, 200]
    url = address(provider, task_id)
    assert [requests.get(url, timeout=10).status_code for _ in range(2)] == [500, 200]


def test_forgetting_loses_jobs_and_keeps_counts(provider: Provider):
    task_id = running(provider, "a ball")
    provider.forget()
    assert ask(provider, task_id).status_code == 404
    assert provider.accepted() == {"afd-1": 1}


def test_the_state_tells_who_sent_a_key_and_not_which(provider: Provider):
    requests.get(address(provider, running(provider, "a ball")), timeout=10)
    state = provider.state()
    assert [request["authorized"] for request in state["requests"]] == [True, True, True, False]
    assert TEST_KEY not in str(state)


def test_equal_prompts_and_seeds_give_equal_bytes_and_others_no_twins(provider: Provider):
    orders = [("a ball", 1), ("a ball", 2), ("a cube", 1), ("a ball", 1)]
    mp4s = [content(provider, "videos", {"prompt": prompt, "seed": seed}) for prompt, seed in orders]
    assert mp4s[0] == mp4s[3]
    clips = [read_video(mp4).frames for mp4 in mp4s[:3]]
    for clip in clips:
        check_motion(clip, frozen=0.1)
    assert not any(is_twin(thumbnail(one), thumbnail(other)) for one, other in combinations(clips, 2))


def test_videos_have_the_shape_that_was_set(provider: Provider):
    provider.reset("32x16,8,4.0")
    video = read_video(content(provider, "videos", {"prompt": "a ball"}))
    assert (video.frames.shape, video.fps) == ((8, 16, 32, 3), 4.0)


def test_a_video_has_sound_where_the_prompt_asks_for_it(provider: Provider):
    mp4 = content(provider, "videos", {"prompt": "a ball sound=yes"})
    with av.open(io.BytesIO(mp4), "r") as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert 2 * 16_000 <= samples < 2 * 16_000 + 3 * 1024  # 2 s at 16 kHz, in whole AAC frames
    assert len(read_video(mp4).frames) == 24


def content(provider: Provider, service: str, fields: dict[str, Any], as_form: bool = False) -> bytes:
    """Order at a /v1/videos server, and download at the second poll."""
    url = provider.base(service) + "/videos"
    order = post(url, fields, as_form)
    assert order.status_code == 200, order.text
    url += "/" + order.json()["id"]
    states = [requests.get(url, headers=HEADERS, timeout=10).json()["status"] for _ in range(2)]
    assert states[1] == "completed"
    return requests.get(url + "/content", headers=HEADERS, timeout=10).content


def post(url: str, fields: dict[str, Any], as_form: bool) -> requests.Response:
    if not as_form:
        return requests.post(url, json=fields, timeout=10, headers=HEADERS)
    parts = {name: (None, str(value)) for name, value in fields.items()}
    return requests.post(url, files=parts, timeout=10, headers=HEADERS)


@pytest.mark.parametrize("service", ["vllm-omni", "fastvideo"])
def test_servers_that_take_forms_make_what_json_orders_elsewhere(service: str, provider: Provider):
    fields = {"prompt": "a ball", "seed": 5}
    assert content(provider, service, fields, as_form=True) == content(provider, "sglang", fields)
    assert provider.accepted() == {f"{service}|a ball|5": 1, "sglang|a ball|5": 1}


@pytest.mark.parametrize(("service", "as_form"), [("vllm-omni", False), ("sglang", True)])
def test_servers_refuse_the_encoding_that_they_do_not_take(service: str, as_form: bool, provider: Provider):
    assert post(provider.base(service) + "/videos", {"prompt": "a ball"}, as_form).status_code == 422
    assert provider.accepted() == {}


def test_a_self_hosted_server_needs_no_key_and_takes_no_wrong_one(provider: Provider):
    url = provider.base("sglang") + "/videos"
    wrong = {"Authorization": "Bearer wrong"}
    assert [requests.get(url, headers=headers, timeout=10).status_code for headers in ({}, wrong)] == [200, 401]


def test_a_form_without_a_seed_gets_fastvideos_own(provider: Provider):
    post(provider.base("fastvideo") + "/videos", {"prompt": "a ball"}, as_form=True)
    assert provider.accepted() == {"fastvideo|a ball|1024": 1}


def test_openrouter_tells_the_price_when_the_video_is_there(provider: Provider):
    url = provider.base("openrouter") + "/videos"
    placed = requests.post(url, json={"model": "m", "prompt": "a ball", "seed": 3}, headers=HEADERS, timeout=10)
    assert (placed.status_code, placed.json()["status"]) == (202, "pending")
    polls = [requests.get(f"{url}/{placed.json()['id']}", headers=HEADERS, timeout=10).json() for _ in range(2)]
    assert [poll["status"] for poll in polls] == ["in_progress", "completed"]
    assert polls[1]["usage"]["cost"] == 0.25
    video = requests.get(polls[1]["unsigned_urls"][0], headers=HEADERS, timeout=10)
    assert read_video(video.content).frames.shape == (24, 48, 64, 3)


def test_openrouter_flags_a_prompt_with_403_and_the_reasons(provider: Provider):
    body = {"model": "m", "prompt": "mode=refuse"}
    answer = requests.post(provider.base("openrouter") + "/videos", json=body, headers=HEADERS, timeout=10)
    assert (answer.status_code, answer.json()["error"]["metadata"]["reasons"]) == (403, ["violence"])


def test_two_hundred_orders_at_once_are_each_counted_once(provider: Provider):
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda n: order(provider, "a ball", token=f"afd-{n}").status_code, range(200)))
    assert answers == [200] * 200
    assert provider.accepted() == {f"afd-{n}": 1 for n in range(200)}
