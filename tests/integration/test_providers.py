"""The teachers behind HTTP against a provider that does everything wrong: what is accepted, and what becomes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from afd_data.acceptance import RejectedError
from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.provider_config import ArkConfig, FalConfig, RunwayConfig, TrafficConfig, VideosConfig
from afd_data.teachers import (
    Delivery,
    FailedError,
    Listing,
    LostError,
    RefusedError,
    Request,
    Teacher,
    UnknownError,
    open_teacher,
)
from afd_data.video import probe
from tests.provider import TEST_KEY, Provider

Open = Callable[..., Teacher]
VIDEO = VideoConfig(width=64, height=48, frames=24, fps=12.0)
SERVICES = ("ark", "videos", "openrouter", "fal", "runway")
SELF_HOSTED = ("vllm-omni", "sglang", "fastvideo")
DELIVERED = ("ok", "slow", "429", "expired", "truncated", "truncated-silently", "html", "flaky")
BILLED = {"ark": 0.2, "openrouter": 0.25, "runway": 0.25}  # 100,000 tokens at 2 a million; its cost; 25 credits at 0.01


@pytest.fixture
def teacher(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`teacher("ark", ...)` -> a teacher of that service of the fake provider; more arguments change its config."""
    monkeypatch.setenv("A_KEY", TEST_KEY)

    def make(service: str, timeout_s: float = 10.0, **settings: object) -> Teacher:
        common = {
            "base_url": provider.base(service),
            "key_variable": "A_KEY",
            "price": 1.5,
            "traffic": TrafficConfig(timeout_s=timeout_s, longest_wait_s=0.01),
        } | settings
        match service:
            case "ark":
                config = ArkConfig.model_validate({"model": "seedance", "price_per_million_tokens": 2.0} | common)
            case "fal":
                config = FalConfig.model_validate({"app": "bytedance/seedance-2.0/text-to-video"} | common)
            case "runway":
                config = RunwayConfig.model_validate({"model": "seedance2"} | common)
            case _:
                dialect = "generic" if service == "videos" else service
                config = VideosConfig.model_validate({"dialect": dialect, "model": "wan"} | common)
        return open_teacher(config)

    return make


@pytest.mark.parametrize("mode", DELIVERED)
@pytest.mark.parametrize("service", SERVICES)
def test_a_video_arrives_and_is_ordered_once(
    provider: Provider, teacher: Open, tmp_path: Path, service: str, mode: str
):
    delivery = _run(teacher(service), _request(mode), tmp_path / "a.mp4")
    facts = probe(tmp_path / "a.mp4")
    assert (facts.width, facts.height, facts.frames, facts.fps) == (64, 48, 24, 12.0)
    assert list(provider.accepted().values()) == [1]
    assert delivery.cost == pytest.approx(BILLED[service]) if service in BILLED else delivery.cost is None
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


@pytest.mark.parametrize("service", SELF_HOSTED)
def test_a_self_hosted_server_delivers_without_a_key(provider: Provider, teacher: Open, tmp_path: Path, service: str):
    free = teacher(service, key_variable=None)
    _run(free, _request("ok"), tmp_path / "a.mp4")
    assert provider.accepted() == {f"{service}|a ball mode=ok|5": 1}
    assert not free.identity.paid


@pytest.mark.parametrize("mode", ["500-after-accept", "drop-after-accept", "drop-before-accept"])
@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_an_order_without_an_answer_is_unknown_and_never_repeated(
    provider: Provider, teacher: Open, service: str, mode: str
):
    with pytest.raises(UnknownError):
        teacher(service).submit(_request(mode))
    assert list(provider.state()["orders"].values()) == [1]
    assert list(provider.accepted().values()) == ([] if mode == "drop-before-accept" else [1])


@pytest.mark.parametrize("service", SERVICES)
def test_an_order_answered_too_late_is_unknown_and_never_repeated(provider: Provider, teacher: Open, service: str):
    with pytest.raises(UnknownError, match="timed out"):
        teacher(service, timeout_s=0.5).submit(_request("timeout-after-accept"))
    assert list(provider.accepted().values()) == [1]


@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_a_refusal_costs_nothing(provider: Provider, teacher: Open, service: str):
    with pytest.raises(RefusedError):
        teacher(service).submit(_request("refuse"))
    assert provider.accepted() == {}


@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_a_refusal_after_the_order_is_one_too(provider: Provider, teacher: Open, tmp_path: Path, service: str):
    with pytest.raises(RefusedError):
        _run(teacher(service), _request("refuse-late"), tmp_path / "a.mp4")
    assert list(provider.accepted().values()) == [1]


@pytest.mark.parametrize("mode", ["fail", "fail-after-billing"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_failed_job_tells_what_it_cost(provider: Provider, teacher: Open, tmp_path: Path, service: str, mode: str):
    with pytest.raises(FailedError) as caught:
        _run(teacher(service), _request(mode), tmp_path / "a.mp4")
    told = BILLED if mode == "fail-after-billing" else {"ark": 0.0, "runway": 0.0}
    assert caught.value.cost == (pytest.approx(told[service]) if service in told else None)
    assert list(provider.accepted().values()) == [1]


@pytest.mark.parametrize("mode", ["gone", "forgets"])
@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_a_job_or_video_that_is_no_longer_there_is_lost(
    provider: Provider, teacher: Open, tmp_path: Path, service: str, mode: str
):
    with pytest.raises(LostError):
        _run(teacher(service), _request(mode), tmp_path / "a.mp4")
    assert list(provider.accepted().values()) == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_another_process_goes_on_with_the_job_id_alone(provider: Provider, teacher: Open, tmp_path: Path, service: str):
    job_id = teacher(service).submit(_request("ok"))
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for file in files:
        _wait(teacher(service), job_id)
        teacher(service).fetch(job_id, _request("ok"), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert list(provider.accepted().values()) == [1]


@pytest.mark.parametrize("service", SERVICES)
def test_a_wrong_key_stops_the_run_and_is_not_repeated_in_the_message(
    provider: Provider, teacher: Open, monkeypatch: pytest.MonkeyPatch, service: str
):
    teacher(service)
    monkeypatch.setenv("OTHER_KEY", "wrong-key-987")
    with pytest.raises(UserError, match="OTHER_KEY") as caught:
        teacher(service, key_variable="OTHER_KEY").submit(_request("ok"))
    assert "wrong-key-987" not in str(caught.value)
    assert provider.accepted() == {}


@pytest.mark.parametrize("service", [*SERVICES, *SELF_HOSTED])
def test_what_is_written_down_names_the_job_and_no_secret(
    provider: Provider, teacher: Open, tmp_path: Path, service: str
):
    asked = teacher(service)
    job_id = asked.submit(_request("ok"))
    _wait(asked, job_id)
    delivery = asked.fetch(job_id, _request("ok"), tmp_path / "a.mp4")
    written = json.dumps([delivery.effective, delivery.provenance, asked.identity.settings])
    assert delivery.provenance["job"] == job_id
    assert delivery.provenance["provider"] == provider.url.removeprefix("http://")
    for secret in (TEST_KEY, "Signature", "?", "A_KEY"):
        assert secret not in written
    assert provider.url not in json.dumps(asked.identity.settings)


@pytest.mark.parametrize("service", ["ark", "runway"])
def test_a_ready_video_is_due_within_a_day(provider: Provider, teacher: Open, service: str):
    asked = teacher(service)
    progress = _wait(asked, asked.submit(_request("ok")))
    assert time.time() + 86_000 < progress <= time.time() + 86_401


def test_an_order_whose_answer_got_lost_is_found_by_its_token(provider: Provider, teacher: Open):
    ark, begin = teacher("ark"), time.time()
    assert isinstance(ark, Listing)
    with pytest.raises(UnknownError):
        ark.submit(_request("500-after-accept"))
    found = {job.token: job for job in ark.jobs(begin)}
    assert found[_request("500-after-accept").token].job_id == provider.state()["jobs"][0]["id"]


def test_the_list_is_read_to_its_end_and_names_every_job_once(
    provider: Provider, teacher: Open, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("afd_data.teachers.ark.PAGE", 2)
    ark, flex, begin = teacher("ark"), teacher("ark", service_tier="flex"), time.time()
    assert isinstance(ark, Listing)
    ids = [(flex if take == 2 else ark).submit(_request("ok", take)) for take in range(5)]
    assert sorted(job.job_id for job in ark.jobs(begin)) == sorted(ids)


def test_a_list_is_read_to_its_end_where_the_service_has_smaller_pages_than_were_asked_for(
    provider: Provider, teacher: Open
):
    ark, begin = teacher("ark"), time.time()
    assert isinstance(ark, Listing)
    provider.limit_pages(2)
    ids = [ark.submit(_request("ok", take)) for take in range(5)]
    assert sorted(job.job_id for job in ark.jobs(begin)) == sorted(ids)


def test_what_a_video_cost_that_is_not_taken_is_told(provider: Provider, teacher: Open, tmp_path: Path):
    provider.reset("64x48,6,12.0")
    with pytest.raises(RejectedError, match="too short") as caught:
        _run(teacher("runway"), _request("ok"), tmp_path / "a.mp4")
    assert caught.value.cost == pytest.approx(0.25)


def test_older_jobs_than_the_provider_lists_prove_nothing(teacher: Open):
    ark = teacher("ark")
    assert isinstance(ark, Listing)
    with pytest.raises(UserError, match="7 days"):
        ark.jobs(time.time() - 8 * 86_400)


def test_only_the_provider_that_echoes_a_token_is_a_listing(teacher: Open):
    assert [service for service in (*SERVICES, *SELF_HOSTED) if isinstance(teacher(service), Listing)] == ["ark"]


def test_ark_is_estimated_by_its_tokens(teacher: Open):
    # 480p: 853.3 x 480 pixels x 24 fps x 5 s / 1024 = 48,000 tokens, at 2 a million
    assert teacher("ark").estimate(VIDEO) == pytest.approx(0.096)
    assert teacher("ark", resolution="720p", duration_s=10).estimate(VIDEO) == pytest.approx(0.432)
    assert teacher("ark", price_per_million_tokens=0.0).estimate(VIDEO) == 1.5


def test_others_are_estimated_by_the_recipe(teacher: Open):
    assert [teacher(service).estimate(VIDEO) for service in ("videos", "fal", "runway")] == [1.5] * 3


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ("ark", {"model": "seedance", "resolution": "480p", "ratio": "16:9", "duration": 5, "generate_audio": False}),
        ("runway", {"model": "seedance2", "ratio": "1280:720", "duration": 5}),
        ("videos", {"model": "wan", "size": "64x48", "seconds": "2"}),
        ("openrouter", {"model": "wan", "duration": 2}),
        ("vllm-omni", {"width": "64", "height": "48", "num_frames": "24", "fps": "12"}),
        ("sglang", {"size": "64x48", "num_frames": 24, "fps": 12, "seed": 5}),
        ("fastvideo", {"size": "64x48", "num_frames": 24, "fps": 12, "seed": 5}),
    ],
)
def test_an_order_is_worded_as_the_service_has_it(
    provider: Provider, teacher: Open, service: str, expected: dict[str, object]
):
    teacher(service).submit(_request("ok"))
    (job,) = provider.state()["jobs"]
    assert {name: job["fields"].get(name) for name in expected} == expected
    assert (job["seed"], job["prompt"]) == (5, "a ball mode=ok")


def test_a_rate_that_is_no_whole_number_is_rounded_up_and_the_length_kept(provider: Provider, teacher: Open):
    video = VideoConfig(width=64, height=48, frames=25, fps=12.5)
    teacher("sglang").submit(Request("f" * 64, "p", "a ball", 0, 5, video))
    (job,) = provider.state()["jobs"]
    assert (job["fields"]["fps"], job["fields"]["num_frames"]) == (13, 26)  # 2 s


def test_options_are_added_and_null_leaves_a_field_out(provider: Provider, teacher: Open):
    options = {"seed": None, "negativePrompt": "rain"}
    teacher("runway", options=options).submit(_request("ok"))
    (job,) = provider.state()["jobs"]
    assert "seed" not in job["fields"]
    assert job["fields"]["negativePrompt"] == "rain"


def test_a_server_that_forgot_its_jobs_has_lost_them(provider: Provider, teacher: Open):
    sglang = teacher("sglang")
    job_id = sglang.submit(_request("ok"))
    sglang.poll(job_id)
    provider.forget()
    with pytest.raises(LostError):
        sglang.poll(job_id)


def test_a_video_of_another_shape_is_brought_to_the_recipes(provider: Provider, teacher: Open, tmp_path: Path):
    provider.reset("96x64,36,24.0")
    delivery = _run(teacher("ark", short="hold"), _request("ok"), tmp_path / "a.mp4")
    facts = probe(tmp_path / "a.mp4")
    assert (facts.width, facts.height, facts.frames, facts.fps) == (64, 48, 24, 12.0)
    assert delivery.effective["provider"]["framespersecond"] == 24


def _request(mode: str, take: int = 0) -> Request:
    return Request(f"{take}{mode:-<63}", "p", f"a ball mode={mode}", take, 5, VIDEO)


def _wait(teacher: Teacher, job_id: str) -> float:
    """Until when the video can be fetched, once it is ready."""
    deadline = time.monotonic() + 20
    while (progress := teacher.poll(job_id)).state != "ready":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return progress.fetch_before


def _run(teacher: Teacher, request: Request, target: Path) -> Delivery:
    job_id = teacher.submit(request)
    _wait(teacher, job_id)
    return teacher.fetch(job_id, request, target)
