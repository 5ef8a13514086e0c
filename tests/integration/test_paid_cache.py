"""The paid cache as its user sees it: the command line against a provider that does everything wrong."""

from __future__ import annotations

import io
import json
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from afd_data.files import one_writer
from tests.provider import TEST_KEY, Provider

Afd = Callable[..., Result]
CACHE = "runs/a/cache"
CLOSED = "http://127.0.0.1:9"  # nobody listens there
# 854 x 480 pixels x 24 fps x 11 s / 1024 = 105,600 tokens are estimated and 100,000 billed, at 2 a million
SECONDS, ESTIMATE, BILLED = 11, 0.2112, 0.2


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder that the test runs in, with the provider's key in the environment."""
    monkeypatch.setenv("A_KEY", TEST_KEY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shop(here: Path, provider: Provider) -> Callable[..., None]:
    """`shop("mode=ok", ..., service="ark", teacher={}, cache={})` writes a.yaml and its prompts."""

    def write(*texts: str, service: str = "ark", teacher: dict | None = None, cache: dict | None = None) -> None:
        numbered = [f"{text} scene {number}" for number, text in enumerate(texts)]
        (here / "prompts.txt").write_text("\n".join(numbered))
        recipe = {
            "out": "runs/a",
            "video": {"width": 64, "height": 48, "frames": 24, "fps": 12},
            "prompts": {"source": "prompts.txt"},
            "teacher": _teacher(provider, service) | (teacher or {}),
            "cache": {"poll_s": 0.02, "workers": 4} | (cache or {}),
        }
        (here / "a.yaml").write_text(json.dumps(recipe))

    return write


def _teacher(provider: Provider, service: str) -> dict[str, Any]:
    traffic = {"timeout_s": 5.0, "attempts": 3, "longest_wait_s": 0.01}
    common = {"base_url": provider.base(service), "key_variable": "A_KEY", "traffic": traffic}
    match service:
        case "ark":
            own = {"name": "ark", "model": "seedance", "price_per_million_tokens": 2.0, "duration_s": SECONDS}
        case "fal":
            own = {"name": "fal", "app": "bytedance/seedance-2.0/text-to-video", "price": 1.5}
        case "runway":
            own = {"name": "runway", "model": "seedance2", "price": 0.25}
        case _:
            own = {"name": "videos", "dialect": "generic" if service == "videos" else service, "model": "wan"}
    return own | common


def states() -> dict[str, int]:
    """Samples by state, from the journal's file."""
    return dict(select("SELECT state, count(*) FROM samples GROUP BY state"))


def select(query: str) -> list[tuple]:
    with closing(sqlite3.connect(f"{CACHE}/journal.sqlite", timeout=30)) as db:
        return db.execute(query).fetchall()


def execute(query: str) -> None:
    with closing(sqlite3.connect(f"{CACHE}/journal.sqlite", timeout=30)) as db, db:
        db.execute(query)


def unknown_keys() -> list[str]:
    return [key for (key,) in select("SELECT key FROM samples WHERE state = 'unknown' ORDER BY id")]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen]:
    """`afd` in a process of its own."""
    command = [sys.executable, "-m", "afd_cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# Orders whose outcome is unknown


def test_an_order_whose_answer_got_lost_is_found_and_its_video_sealed(afd: Afd, shop, provider: Provider):
    shop("mode=ok", "mode=500-after-accept", "mode=drop-after-accept")
    assert "2 unknown" in afd("cache-teacher", "a").stdout
    assert "2 found" in afd("cache", "reconcile", "a").stdout
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 3}
    assert list(provider.accepted().values()) == [1, 1, 1]


def test_an_order_that_never_arrived_is_absent_and_is_ordered_again_by_a_person(afd: Afd, shop, provider: Provider):
    shop("mode=ok", "mode=drop-before-accept")
    afd("cache-teacher", "a")
    assert "1 absent" in afd("cache", "reconcile", "a", "--grace-minutes", 0).stdout
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 1, "unknown": 1}
    assert "1 planned again" in afd("cache", "resubmit", CACHE, "--absent").stdout
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 2}
    assert list(provider.accepted().values()) == [1, 1]


def test_an_order_younger_than_the_grace_is_not_called_absent(afd: Afd, shop):
    shop("mode=ok", "mode=drop-before-accept")
    afd("cache-teacher", "a")
    said = afd("cache", "reconcile", "a").stdout
    assert "absent" not in said
    assert "1 ordered less than 15 minutes ago" in said
    assert unknown_keys()[0] in said
    assert "0 planned again" in afd("cache", "resubmit", CACHE, "--absent").stdout


def test_a_job_that_is_no_longer_listed_stays_unknown(afd: Afd, shop):
    shop("mode=ok", "mode=forgets")
    afd("cache-teacher", "a")
    assert "1 still unknown" in afd("cache", "reconcile", "a", "--grace-minutes", 0).stdout
    assert states() == {"sealed": 1, "unknown": 1}


def test_nothing_unknown_is_said_and_the_provider_is_not_asked(afd: Afd, shop, provider: Provider):
    shop("mode=ok")
    afd("cache-teacher", "a")
    before = provider.state()["requests"]
    assert "nothing is unknown" in afd("cache", "reconcile", "a").stdout
    assert provider.state()["requests"] == before


def test_what_may_be_charged_twice_is_ordered_again_only_with_yes(afd: Afd, shop):
    shop("mode=ok", "mode=500-after-accept")
    afd("cache-teacher", "a")
    (key,) = unknown_keys()
    refused = afd("cache", "resubmit", CACHE, key)
    assert refused.exit_code == 2
    assert f"may have been charged already, such as {key}" in refused.stderr
    assert states() == {"sealed": 1, "unknown": 1}
    assert "1 planned again" in afd("cache", "resubmit", CACHE, key, "--yes").stdout
    assert states() == {"sealed": 1, "planned": 1}


def test_what_was_refused_is_ordered_again_without_yes(afd: Afd, shop):
    shop("mode=ok", "mode=refuse")
    afd("cache-teacher", "a")
    assert "1 planned again" in afd("cache", "resubmit", CACHE, "--state", "refused").stdout
    assert states() == {"sealed": 1, "planned": 1}


def test_a_video_that_is_given_up_no_longer_holds_back_the_others(afd: Afd, shop):
    shop("mode=flaky", "mode=ok", "mode=ok", teacher={"traffic": {"attempts": 1, "longest_wait_s": 0.01}})
    assert "1 are still with the teacher" in afd("cache-teacher", "a", "--set", "cache.shard_samples=1").stdout
    ((key,),) = select("SELECT key FROM samples WHERE state = 'submitted'")
    assert "1 given up" in afd("cache", "give-up", CACHE, key).stdout
    said = afd("cache-teacher", "a")
    assert states() == {"sealed": 2, "unknown": 1}
    assert "it cannot be told" not in said.stdout
    assert "nothing is unknown" in afd("cache", "reconcile", "a").stdout


def test_a_job_that_is_known_goes_on_where_the_provider_lists_nothing(afd: Afd, shop):
    shop("mode=ok", "mode=ok", service="runway")
    afd("cache-teacher", "a")
    execute("UPDATE samples SET state = 'unknown', shard = '' WHERE id = 2 AND state = 'sealed'")
    assert "1 found" in afd("cache", "reconcile", "a").stdout


def test_a_key_that_nobody_knows_is_named_and_nothing_is_planned(afd: Afd, shop):
    shop("mode=ok", "mode=refuse")
    afd("cache-teacher", "a")
    ((key,),) = select("SELECT key FROM samples WHERE state = 'refused'")
    said = afd("cache", "resubmit", CACHE, key, "p0-00")
    assert said.exit_code == 2
    assert "p0-00" in said.stderr
    assert states() == {"sealed": 1, "refused": 1}


def test_orders_are_not_settled_while_a_run_goes_on(afd: Afd, shop):
    shop("mode=ok", "mode=drop-before-accept")
    afd("cache-teacher", "a")
    with one_writer(Path(CACHE) / ".lock", "the test"):
        for command in (("resubmit", CACHE, "--absent"), ("reconcile", "a")):
            said = afd("cache", *command)
            assert said.exit_code == 2
            assert "another afd process" in said.stderr


def test_a_provider_that_lists_nothing_leaves_the_decision_to_a_person(afd: Afd, shop):
    shop("mode=ok", "mode=drop-before-accept", service="runway")
    afd("cache-teacher", "a")
    said = afd("cache", "reconcile", "a")
    assert said.exit_code == 2
    assert "lists no jobs" in said.stderr
    assert "afd cache resubmit" in said.stderr


# Costs


def test_the_books_go_from_what_is_reserved_to_what_the_provider_billed(afd: Afd, shop):
    shop("mode=ok", "mode=ok", "mode=fail-after-billing", "mode=fail", "mode=refuse", "mode=500-after-accept")
    afd("cache-teacher", "a")
    # 100,000 tokens each for two videos and a failure; the estimate for the order that may have arrived
    costs = dict(select("SELECT s.prompt, r.cost FROM samples s JOIN requests r USING (fingerprint)"))
    by_mode = {prompt.split()[0].removeprefix("mode="): cost for prompt, cost in costs.items()}
    assert by_mode == {
        "ok": pytest.approx(BILLED),
        "fail-after-billing": pytest.approx(BILLED),
        "fail": 0.0,
        "refuse": 0.0,
        "500-after-accept": None,
    }
    said = afd("cache", "status", CACHE).stdout
    assert "spent: 0.60 USD, 0.21 more reserved" in said


def test_a_limit_counts_what_is_in_flight_and_a_higher_one_goes_on(afd: Afd, shop, provider: Provider):
    shop(*["mode=ok"] * 6)
    stopped = afd("cache-teacher", "a", "--max-cost", 0.65)
    assert stopped.exit_code == 2
    assert "would exceed cache.max_cost=0.65" in stopped.stderr
    assert len(provider.accepted()) == 3  # 3 x 0.2112 fit; then 3 x 0.2 are spent, and 0.2112 more would not
    assert states() == {"sealed": 3, "planned": 3}
    assert afd("cache-teacher", "a", "--max-cost", 1.3).exit_code == 0
    assert states() == {"sealed": 6}
    assert select("SELECT sum(cost) FROM requests") == [(pytest.approx(6 * BILLED),)]


def test_a_limit_that_cannot_be_kept_as_no_price_is_known_orders_nothing(afd: Afd, shop, provider: Provider):
    shop("mode=ok", teacher={"price_per_million_tokens": 0.0})
    said = afd("cache-teacher", "a", "--max-cost", 5)
    assert said.exit_code == 2
    assert "cannot be kept" in said.stderr
    assert provider.accepted() == {}
    assert "cannot be kept" not in afd("cache-teacher", "a").stderr


def test_videos_shorter_than_the_recipe_wants_are_not_asked_for(afd: Afd, shop, provider: Provider):
    shop("mode=ok", teacher={"duration_s": 1})  # 24 frames at 12 fps are 2 s
    said = afd("cache-teacher", "a")
    assert said.exit_code == 2
    assert "teacher.duration_s: 1 s are asked for, and 24 frames at 12 fps are 2.00 s" in said.stderr
    assert provider.accepted() == {}
    assert afd("cache-teacher", "a", "--set", "teacher.short=hold").exit_code == 0


def test_a_limit_below_one_video_orders_nothing(afd: Afd, shop, provider: Provider):
    shop("mode=ok")
    said = afd("cache-teacher", "a", "--max-cost", 0.21)
    assert said.exit_code == 2
    assert provider.accepted() == {}


def test_what_is_unknown_stays_reserved_within_the_limit(afd: Afd, shop, provider: Provider):
    shop(*["mode=500-after-accept"] * 3)
    for _ in range(2):
        assert afd("cache-teacher", "a", "--max-cost", 0.43).exit_code == 2
        assert list(provider.accepted().values()) == [1, 1]  # 2 x 0.2112


@pytest.mark.parametrize("limit", [("--set", "cache.max_cost=0.5"), ("--max-cost", "0.5")])
def test_a_dry_run_prints_the_estimate_and_asks_nobody(
    afd: Afd, shop, provider: Provider, here: Path, limit: tuple[str, str]
):
    shop(*["mode=ok"] * 5)
    said = afd("cache-teacher", "a", "--dry-run", *limit)
    assert said.exit_code == 0, said.output
    assert "about 1.06 USD, 0.211 a video; stops at 0.5" in said.stdout  # 5 x 0.2112
    assert provider.state()["requests"] == []
    assert not (here / "runs").exists()


def test_other_currencies_are_kept_apart(afd: Afd, shop):
    shop("mode=ok", teacher={"currency": "EUR"})
    afd("cache-teacher", "a")
    assert "spent: 0.20 EUR" in afd("cache", "status", CACHE).stdout


@pytest.mark.slow  # starts the command, and its videos take a second each
def test_status_from_another_process_while_a_run_goes_on(afd: Afd, shop):
    shop("mode=500-after-accept", "mode=drop-before-accept", *["mode=slow"] * 6, cache={"workers": 2})
    with running("cache-teacher", "a") as run:
        wait_until(Path(f"{CACHE}/journal.sqlite").exists)
        wait_until(lambda: " a minute; " in afd("cache", "status", CACHE).stdout and len(unknown_keys()) == 2)
        said = afd("cache", "status", CACHE).stdout
        assert run.wait(60) == 0
    assert "a run is going on" in said
    assert "more" in said.partition(" a minute; ")[2]
    assert "USD" in said
    assert all(key in said for key in unknown_keys())
    assert "no run is going on" in afd("cache", "status", CACHE).stdout


# Traffic


def test_failures_one_after_the_other_stop_the_run_with_the_last_reason(afd: Afd, shop, provider: Provider):
    shop(*["mode=fail"] * 12, cache={"workers": 1, "stop_after_failures": 3})
    said = afd("cache-teacher", "a")
    assert said.exit_code == 2
    assert "3 requests failed one after the other, the last with: InternalServiceError" in said.stderr
    assert 3 <= len(provider.accepted()) <= 4  # one may have been handed out before


def test_a_wrong_key_ends_the_run_and_everything_is_planned_again(
    afd: Afd, shop, provider: Provider, monkeypatch: pytest.MonkeyPatch
):
    shop(*["mode=ok"] * 3)
    monkeypatch.setenv("A_KEY", "wrong")
    said = afd("cache-teacher", "a")
    assert said.exit_code == 2
    assert "the key is not valid" in said.stderr
    assert "A_KEY" in said.stderr
    assert states() == {"planned": 3}
    monkeypatch.setenv("A_KEY", TEST_KEY)
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 3}
    assert select("SELECT sum(cost) FROM requests") == [(pytest.approx(3 * BILLED),)]


def test_a_provider_that_is_down_has_taken_nothing(afd: Afd, shop, provider: Provider):
    shop(*["mode=ok"] * 3)
    said = afd("cache-teacher", "a", "--set", f"teacher.base_url={CLOSED}", "--set", "cache.stop_after_failures=2")
    assert said.exit_code == 2
    assert "not ordered after 3 tries" in said.stderr
    assert "unknown" not in states()
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 3}
    assert list(provider.accepted().values()) == [1, 1, 1]


@pytest.mark.slow  # starts the command, and its videos take a second each
def test_ctrl_c_finishes_what_is_in_flight_and_the_same_command_goes_on(afd: Afd, shop, provider: Provider):
    shop(*["mode=slow"] * 8, cache={"workers": 2})
    with running("cache-teacher", "a") as run:
        wait_until(lambda: provider.accepted())
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 130
    assert "the same command" in said
    assert "intent" not in states()
    assert "unknown" not in states()
    assert states()["planned"] >= 4
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 8}
    assert list(provider.accepted().values()) == [1] * 8


@pytest.mark.slow  # starts the command, and waits for its rate
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_waits_for_its_turn_is_ordered_no_more_and_is_not_unknown(
    afd: Afd, shop, provider: Provider, number: signal.Signals
):
    shop(*["mode=ok"] * 6, teacher={"traffic": {"requests_per_minute": 30}}, cache={"workers": 4})
    with running("cache-teacher", "a") as run:
        wait_until(lambda: any(request["path"].startswith("/files/") for request in provider.state()["requests"]))
        time.sleep(0.3)
        run.send_signal(number)
        begin = time.monotonic()
        run.wait(60)
    assert time.monotonic() - begin < 1.5  # the next turn comes after 2 s
    assert len(provider.accepted()) == 1
    assert not {"intent", "unknown"} & states().keys()


@pytest.mark.slow  # starts the command
def test_ctrl_c_twice_exits_at_once_and_the_same_command_goes_on(afd: Afd, shop, provider: Provider):
    shop(*["mode=timeout-after-accept"] * 2, "mode=ok", cache={"workers": 2}, teacher={"duration_s": SECONDS})
    with running("cache-teacher", "a") as run:
        wait_until(lambda: len(provider.accepted()) >= 2)
        run.send_signal(signal.SIGINT)
        time.sleep(0.2)
        begin = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    assert time.monotonic() - begin < 2.0  # both answers take 3 s
    afd("cache-teacher", "a")
    assert states().get("unknown") == len(unknown_keys()) > 0
    assert "found" in afd("cache", "reconcile", "a").stdout
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 3}
    assert list(provider.accepted().values()) == [1] * 3


def leave_in_flight(afd: Afd, shop, service: str) -> None:
    """One video is there, and one job was ordered that a run could not ask about."""
    shop("mode=flaky", "mode=ok", service=service, teacher={"traffic": {"attempts": 1, "longest_wait_s": 0.01}})
    said = afd("cache-teacher", "a")
    assert said.exit_code == 0
    assert "1 are still with the teacher" in said.stdout
    assert states() == {"sealed": 1, "submitted": 1}


def test_a_self_hosted_server_that_forgot_its_jobs_is_asked_again(afd: Afd, shop, provider: Provider):
    leave_in_flight(afd, shop, "fastvideo")
    provider.forget()
    for _ in range(3):  # finds the job lost; asks for it again, and cannot ask about it; fetches it
        assert afd("cache-teacher", "a", "--set", "teacher.traffic.attempts=3").exit_code == 0
    assert states() == {"sealed": 2}
    assert sorted(provider.accepted().values()) == [1, 2]


def test_a_paid_server_that_forgot_its_jobs_is_not_asked_again(afd: Afd, shop, provider: Provider):
    leave_in_flight(afd, shop, "ark")
    provider.forget()
    for _ in range(2):
        assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 1, "unknown": 1}
    assert list(provider.accepted().values()) == [1, 1]


def test_a_finished_cache_says_so_and_asks_nobody(afd: Afd, shop, provider: Provider):
    shop("mode=ok", "mode=refuse")
    afd("cache-teacher", "a")
    before = provider.state()["requests"]
    again = afd("cache-teacher", "a")
    assert again.exit_code == 0
    assert "1 samples in 1 shards" in again.stdout
    assert "nothing to ask for" in again.output
    assert provider.state()["requests"] == before


# Downloads


@pytest.mark.parametrize("mode", ["expired", "truncated", "truncated-silently", "html"])
def test_a_download_that_went_wrong_is_fetched_again_and_paid_once(afd: Afd, shop, provider: Provider, mode: str):
    shop(f"mode={mode}")
    assert afd("cache-teacher", "a").exit_code == 0
    assert states() == {"sealed": 1}
    assert list(provider.accepted().values()) == [1]


def test_after_a_restart_the_videos_that_expire_first_are_fetched_first(afd: Afd, shop, provider: Provider):
    once = {"traffic": {"attempts": 1, "longest_wait_s": 0.01}}
    shop(*["mode=flaky"] * 3, "mode=ok", teacher=once, cache={"workers": 1})
    for _ in range(2):  # each address fails once: that of the job, then that of its video
        afd("cache-teacher", "a")
    assert states()["ready"] == 3
    execute("UPDATE requests SET fetch_before = 2e9 - id WHERE state = 'ready'")
    latest_first = select("SELECT job_id FROM requests WHERE state = 'ready' ORDER BY id DESC")
    before = len(provider.state()["requests"])
    assert afd("cache-teacher", "a").exit_code == 0
    paths = [request["path"] for request in provider.state()["requests"][before:]]
    fetched = [path.removeprefix("/files/").removesuffix(".mp4") for path in paths if path.startswith("/files/")]
    assert fetched == [job_id for (job_id,) in latest_first]


# Acceptance


def test_another_size_and_rate_become_what_was_asked_for(afd: Afd, shop, provider: Provider):
    provider.reset("96x64,72,24.0")
    shop("mode=ok")
    assert afd("cache-teacher", "a").exit_code == 0
    (sample,) = samples()
    assert (sample["width"], sample["height"], sample["frames"], sample["fps"]) == (64, 48, 24, 12.0)
    effective = json.loads(sample["effective_json"])
    assert effective["encoded_again"]
    assert effective["source"] == {"width": 96, "height": 64, "frames": 72, "fps": 24.0, "codec": "h264"}
    with av.open(io.BytesIO(videos()[0]), "r") as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert (len(pictures), pictures[0].shape) == (24, (48, 64, 3))


@pytest.mark.parametrize(
    ("rule", "reason"), [({"frozen": 255.0}, "frozen"), ({"black": 255.0}, "black"), ({}, "near-duplicate")]
)
def test_what_is_rejected_stays_in_the_books_with_its_reason(afd: Afd, shop, rule: dict, reason: str):
    # All prompts get the video of one prompt and seed, so that from the second on they are twins.
    same = {"options": {"content": [{"type": "text", "text": "a ball"}], "seed": 1}}
    shop("one", "two", "three", teacher=same, cache=rule)
    said = afd("cache-teacher", "a")
    rejected = 2 if reason == "near-duplicate" else 3
    assert f"{rejected} x {reason}" in said.output.replace("rejected (", "").replace(")", "")
    assert states()["rejected"] == rejected
    assert "spent: 0.60 USD" in afd("cache", "status", CACHE).stdout
    again = afd("cache-teacher", "a")
    assert states()["rejected"] == rejected, again.output
    assert select("SELECT count(*) FROM requests") == [(3,)]


@pytest.mark.parametrize("audio", ["drop", "keep"])
def test_sound_is_dropped_or_kept_as_the_recipe_says(afd: Afd, shop, audio: str):
    shop("sound=yes", cache={"audio": audio})
    assert afd("cache-teacher", "a").exit_code == 0
    with av.open(io.BytesIO(videos()[0]), "r") as container:
        assert len(container.streams.audio) == (audio == "keep")


def videos() -> list[bytes]:
    """The sealed mp4s."""
    return _members(".mp4")


def samples() -> list[dict]:
    """The sealed JSONs."""
    return [json.loads(text) for text in _members(".json")]


def _members(ending: str) -> list[bytes]:
    found = []
    for path in sorted(Path(CACHE).glob("data/*/*.tar")):
        with tarfile.open(path) as tar:
            files = [tar.extractfile(name) for name in tar.getnames() if name.endswith(ending)]
            found += [file.read() for file in files if file is not None]
    return found


# Secrets

SERVICES = ("ark", "videos", "openrouter", "fal", "runway")
MODES = ("ok", "expired", "gone", "html", "truncated", "flaky", "refuse", "refuse-late", "fail", "forgets",
         "500-after-accept", "drop-after-accept")  # fmt: skip
HUB_TOKEN = "hf_a_token_that_must_not_be_written"
SIGNATURES = ("Signature", "X-Amz-", "X-Tos-", "a-signature-that-opens")


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, and the texts in its parquet files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()
            if path.suffix == ".parquet":
                yield f"{path} as text", str(pq.ParquetFile(path).read().to_pylist()).encode()


def assert_no_secret(folder: Path, *said: str) -> None:
    for where, data in [*written(folder), *(("output", text.encode()) for text in said)]:
        for secret in (TEST_KEY, HUB_TOKEN, *SIGNATURES):
            assert secret.encode() not in data, f"{secret} in {where}"


@pytest.mark.parametrize("service", SERVICES)
def test_no_key_and_no_signed_address_is_written(
    afd: Afd, shop, here: Path, monkeypatch: pytest.MonkeyPatch, service: str
):
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    shop(*(f"mode={mode}" for mode in MODES), service=service, cache={"stop_after_failures": 100})
    commands = [("cache-teacher", "a"), ("cache", "status", CACHE), ("cache", "reconcile", "a"), ("cache-teacher", "a"),
                ("cache", "inspect", CACHE), ("cache", "verify", CACHE)]  # fmt: skip
    said = [afd("-v", *command).output for command in commands]
    assert {"sealed", "refused", "failed", "unknown"} <= states().keys()
    assert_no_secret(here, *said)


def test_the_journal_of_a_process_that_was_killed_holds_no_secret(afd: Afd, shop, here: Path, provider: Provider):
    shop(*["mode=slow"] * 3, "mode=500-after-accept")
    with running("-v", "cache-teacher", "a") as run:
        wait_until(lambda: len(provider.accepted()) == 4)
        run.kill()
        said = run.communicate()[0]
    assert Path(f"{CACHE}/journal.sqlite-wal").exists()
    assert_no_secret(here, said)


@contextmanager
def telltale() -> Iterator[str]:
    """The address of a server that repeats in its errors what it was sent, and says where its files lie."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(401 if self.path.startswith("/closed") else 200, {"id": "job-1", "error": self._words()})

        def do_GET(self) -> None:
            self._say(200, {"id": "job-1", "status": "failed", "error": self._words()})

        def _words(self) -> dict[str, str]:
            key = self.headers.get("Authorization", "")
            return {"message": f"{key} https://me:{key[7:]}@store/a.mp4?X-Amz-Signature=a-signature-that-opens&k={key}"}

        def _say(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("door", ["open", "closed"])
@pytest.mark.parametrize("service", ["ark", "openrouter"])
def test_a_provider_that_repeats_the_key_in_its_errors_is_not_quoted(
    afd: Afd, shop, here: Path, service: str, door: str
):
    with telltale() as url:
        shop("mode=ok", service=service, teacher={"base_url": f"{url}/{door}"})
        said = afd("-v", "cache-teacher", "a")
    assert said.exit_code == 2
    assert ("the key is not valid" in said.stderr) == (door == "closed")
    assert_no_secret(here, said.output)
