"""The journal: what is legal, what is durable when, and that a cache only grows."""

import hashlib
import resource
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.journal import Journal
from afd_data.journal_file import SCHEMA_VERSION, is_network
from afd_data.plan import Planned, fingerprint, plan_samples, request_seed
from afd_data.prompts import Prompt
from afd_data.states import TRANSITIONS, check_transition
from afd_data.teachers import Identity

IDENTITY = Identity("someone", "1", {"style": "plain"})


def planned(number: int, **changes) -> Planned:
    sample = Planned(
        key=f"p{number}-00",
        generation=0,
        split="train",
        prompt_id=f"p{number}",
        prompt=f"prompt {number}",
        take=0,
        seed=number,
        fingerprint=f"f{number}",
    )
    return replace(sample, **changes)


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "journal.sqlite")
    opened.plan([planned(1), planned(2)])
    yield opened
    opened.close()


def states(journal: Journal) -> list[str]:
    return [row.state for row in journal.rows()]


def test_every_transition_leads_to_a_state_of_the_table():
    assert {to for allowed in TRANSITIONS.values() for to in allowed} <= TRANSITIONS.keys()


def test_what_is_sealed_stays_sealed():
    assert not TRANSITIONS["sealed"]


@pytest.mark.parametrize("state", ["refused", "failed", "rejected"])
def test_what_ended_without_a_video_can_only_be_planned_again(state):
    assert TRANSITIONS[state] == {"planned"}


def test_an_unknown_order_is_never_asked_again_but_through_the_plan():
    assert TRANSITIONS["unknown"] == {"planned", "submitted"}


def test_every_state_can_be_reached_from_planned():
    reached = {"planned"}
    for _ in TRANSITIONS:
        reached |= {to for state in reached for to in TRANSITIONS[state]}
    assert reached == TRANSITIONS.keys()


def test_a_video_cannot_be_ready_before_it_was_asked_for(journal):
    with pytest.raises(AssertionError, match="planned -> ready"):
        journal.move(1, "ready")
    assert states(journal) == ["planned", "planned"]


@pytest.mark.parametrize("old", list(TRANSITIONS))
def test_nothing_goes_back_to_intent_but_from_planned(old):
    if old == "planned":
        check_transition(old, "intent")
    else:
        with pytest.raises(AssertionError):
            check_transition(old, "intent")


def test_without_patience_a_record_is_on_disk_when_move_returns(journal, tmp_path):
    journal.move(1, "intent")
    with sqlite3.connect(tmp_path / "journal.sqlite") as other:
        assert other.execute("SELECT state FROM samples WHERE id = 1").fetchone() == ("intent",)
        assert other.execute("SELECT fingerprint, state FROM requests").fetchall() == [("f1", "intent")]


def test_with_patience_records_are_committed_together(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite", patience_s=60.0)
    journal.plan([planned(1), planned(2)])
    journal.move(1, "intent")
    journal.move(2, "intent")
    with sqlite3.connect(tmp_path / "journal.sqlite") as other:
        query = "SELECT count(*) FROM samples WHERE state = 'intent'"
        assert other.execute(query).fetchone() == (0,)
        journal.flush()
        assert other.execute(query).fetchone() == (2,)
    journal.close()


def test_a_second_attempt_is_a_row_of_its_own_and_the_first_keeps_its_cost(journal):
    journal.move(1, "intent")
    journal.move(1, "submitted", job_id="job-a")
    journal.move(1, "failed", reason="failed: no GPU", cost=0.5, currency="EUR")
    journal.move(1, "planned")
    journal.move(1, "intent")
    journal.move(1, "submitted", job_id="job-b")
    rows = journal.select("SELECT job_id, state, cost, currency, reason FROM requests ORDER BY id")
    assert rows == [("job-a", "failed", 0.5, "EUR", "failed: no GPU"), ("job-b", "submitted", None, "", "")]
    assert journal.job_id("f1") == "job-b"


def test_plan_adds_what_is_new_behind_what_is_known(journal):
    assert journal.plan([planned(3), planned(1), planned(2)]) == 1
    assert [(row.id, row.key) for row in journal.rows()] == [(1, "p1-00"), (2, "p2-00"), (3, "p3-00")]


def test_a_plan_with_the_digest_of_the_last_one_is_not_read(journal):
    assert journal.plan([planned(1), planned(2), planned(3)], digest="a") == 1
    assert journal.plan((planned(1 // zero) for zero in [0]), digest="a") == 0


def test_the_digest_that_began_a_round_stands_for_its_samples(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.start_round(0, {}, {}, [planned(1), planned(2)], digest="a")
    assert journal.plan((planned(1 // zero) for zero in [0]), digest="a") == 0
    journal.close()


def test_a_plan_with_another_digest_is_read(journal):
    journal.plan([planned(1), planned(2)], digest="a")
    assert journal.plan([planned(1), planned(2), planned(3)], digest="b") == 1


def test_a_plan_is_read_again_when_samples_came_from_elsewhere(journal, tmp_path):
    journal.plan([planned(1), planned(2)], digest="a")
    with sqlite3.connect(tmp_path / "journal.sqlite") as other:
        copy = "SELECT 'p9-00', generation, split, prompt_id, 'prompt 9', take, seed, 'f9', state FROM samples LIMIT 1"
        columns = "key, generation, split, prompt_id, prompt, take, seed, fingerprint, state"
        other.execute(f"INSERT INTO samples ({columns}) {copy}")
    with pytest.raises(UserError, match="'prompt 9' is no longer among the prompts"):
        journal.plan([planned(1), planned(2)], digest="a")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([planned(1)], "'prompt 2' is no longer among the prompts"),
        ([planned(1), planned(2, split="test")], "moved from train to test.*an added prompt"),
        ([planned(1), planned(2, prompt="Prompt 2", fingerprint="other")], "'prompt 2' is now 'Prompt 2'"),
    ],
)
def test_a_cache_only_grows(journal, second, message):
    with pytest.raises(UserError, match=message):
        journal.plan([planned(3), *second])
    assert states(journal) == ["planned", "planned"]


def test_rows_come_in_the_order_of_the_plan_whatever_the_page(journal):
    journal.plan([planned(number) for number in range(1, 8)])
    assert [row.prompt for row in journal.rows(after=2, page=2)] == [f"prompt {n}" for n in range(3, 8)]


def test_a_reader_cannot_write(journal, tmp_path):
    reader = Journal(tmp_path / "journal.sqlite", writable=False)
    assert reader.counts() == {"planned": 2}
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.move(1, "intent")


def test_a_journal_of_another_version_is_refused(tmp_path):
    Journal(tmp_path / "journal.sqlite").close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as other:
        other.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match=f"journal version {SCHEMA_VERSION + 1}, this afd reads {SCHEMA_VERSION}"):
        Journal(tmp_path / "journal.sqlite")


def test_a_journal_that_is_being_made_is_not_called_one_of_version_0(tmp_path):
    sqlite3.connect(tmp_path / "journal.sqlite").execute("PRAGMA journal_mode = WAL").connection.close()
    with pytest.raises(UserError, match="is being made at this moment"):
        Journal(tmp_path / "journal.sqlite", writable=False)
    Journal(tmp_path / "journal.sqlite").close()


@pytest.mark.parametrize("state", ["planned", "intent", "unknown"])
def test_a_journal_from_before_the_shards_is_said_to_be_older_than_they(journal, state):
    if state != "planned":
        journal.move(1, "intent")
    if state == "unknown":
        journal.move(1, "unknown", reason="no answer")
    with pytest.raises(UserError, match=r"journal\.sqlite: older than the shards"):
        journal.move(1, "sealed", shard="data/train/000000.tar")
    assert states(journal)[0] == state


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "journal.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(UserError, match="not a journal"):
        Journal(tmp_path / "journal.sqlite")


def test_every_commit_is_synchronous(journal):
    assert journal.select("PRAGMA synchronous") == [(2,)]  # FULL


def test_after_a_failed_write_the_journal_takes_nothing_more(journal, tmp_path):
    journal.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        with pytest.raises(sqlite3.OperationalError):
            journal.set_fact("long", "x" * (largest + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(sqlite3.OperationalError):
        journal.move(1, "intent")
    assert states(journal) == ["planned", "planned"]


# Money


def test_an_estimate_is_reserved_from_the_intent_and_replaced_by_what_was_charged(journal):
    journal.move(1, "intent", estimate=0.5, currency="EUR")
    journal.move(2, "intent", estimate=0.5, currency="EUR")
    assert journal.spend() == {"EUR": (0.0, 1.0)}
    journal.move(1, "submitted", job_id="a")
    journal.move(1, "ready")
    journal.move(1, "spooled", cost=0.4)
    assert journal.spend() == {"EUR": (0.4, 0.5)}
    journal.move(2, "refused", cost=0.0)
    assert journal.spend() == {"EUR": (0.4, 0.0)}


def test_what_an_unknown_order_may_cost_stays_reserved_even_when_it_is_ordered_again(journal):
    journal.move(1, "intent", estimate=0.5, currency="EUR")
    journal.move(1, "unknown", reason="no answer")
    journal.move(1, "planned")
    journal.move(1, "intent", estimate=0.5, currency="EUR")
    assert journal.spend() == {"EUR": (0.0, 1.0)}


def test_an_order_that_provably_did_not_arrive_reserves_nothing(journal):
    journal.move(1, "intent", estimate=0.5, currency="EUR")
    journal.move(1, "planned")
    assert journal.spend() == {"EUR": (0.0, 0.0)}
    assert journal.select("SELECT state FROM requests") == [("failed",)]


def test_an_absent_order_is_noted_without_a_change_of_state(journal):
    journal.move(1, "intent", estimate=0.5, currency="EUR")
    journal.move(1, "unknown", reason="no answer")
    journal.note(1, "absent: never taken", cost=0.0)
    assert [(row.state, row.reason) for row in journal.rows(states=("unknown",))] == [
        ("unknown", "absent: never taken")
    ]
    assert journal.spend() == {"EUR": (0.0, 0.0)}


# Order, rounds, places


def test_videos_that_expire_first_are_fetched_first_and_new_orders_come_last(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite")
    journal.plan([planned(number) for number in range(1, 6)])
    for number in (2, 3, 4, 5):
        journal.move(number, "intent")
        journal.move(number, "submitted", job_id=str(number))
    journal.move(3, "ready", fetch_before=2000.0)
    journal.move(5, "ready", fetch_before=1000.0)
    journal.move(4, "running")
    assert [row.id for row in journal.pending()] == [5, 3, 2, 4, 1]
    journal.close()


def test_a_round_begins_with_all_of_its_samples_or_not_at_all(journal):
    assert journal.start_round(1, {"teacher": "b"}, {"age": 1}, [planned(1, generation=1, fingerprint="g1")]) == 1
    with pytest.raises(sqlite3.IntegrityError):
        journal.start_round(2, {}, {}, [planned(1, generation=2, fingerprint="g2"), planned(2, fingerprint="g1")])
    assert [(each.generation, each.facts, each.why) for each in journal.rounds()] == [(1, {"teacher": "b"}, {"age": 1})]
    assert states(journal) == ["planned", "planned", "planned"]
    journal.finish_round(1)
    assert journal.rounds()[0].finished_at >= journal.rounds()[0].started_at > 0


MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 server:/data rw
31 30 0:41 / /data/fast\\040disk rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("folder", "network"),
    [("/home/me", False), ("/data/cache", True), ("/data/fast disk/cache", False), ("/database", False)],
)
def test_a_folder_belongs_to_the_longest_mount_point_above_it(tmp_path, folder, network):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert is_network(Path(folder), tmp_path / "mountinfo") is network


@pytest.mark.parametrize("mode", ["wal", "rollback"])
def test_a_reader_sees_every_commit_while_the_writer_is_open(tmp_path, mode):
    writer = Journal(tmp_path / "journal.sqlite", mode=mode)
    writer.plan([planned(1)])
    for state in ("intent", "submitted"):
        writer.move(1, state)
        reader = Journal(tmp_path / "journal.sqlite", writable=False)
        assert reader.counts() == {state: 1}
        reader.close()
    assert (tmp_path / "journal.sqlite-wal").exists() is (mode == "wal")
    writer.close()


# Fingerprints


def test_a_fingerprint_is_the_hash_of_everything_that_changes_the_video():
    text = (
        '{"prompt":"a red ball","seed":7,"take":0,'
        '"teacher":{"name":"someone","settings":{"style":"plain"},"version":"1"},'
        '"video":{"crf":18,"fps":8.0,"frames":12,"height":16,"lossless":false,"width":16}}'
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert fingerprint("a red ball", IDENTITY, VideoConfig(), seed=7, take=0) == expected


def test_any_change_of_a_request_changes_its_fingerprint():
    video = VideoConfig()
    requests = [
        ("a", IDENTITY, video, 7, 0, 0),
        ("b", IDENTITY, video, 7, 0, 0),
        ("a", replace(IDENTITY, name="other"), video, 7, 0, 0),
        ("a", replace(IDENTITY, version="2"), video, 7, 0, 0),
        ("a", replace(IDENTITY, settings={"style": "wild"}), video, 7, 0, 0),
        ("a", IDENTITY, VideoConfig(frames=13), 7, 0, 0),
        ("a", IDENTITY, video, 8, 0, 0),
        ("a", IDENTITY, video, 7, 1, 0),
        ("a", IDENTITY, video, 7, 0, 1),
    ]
    assert len({fingerprint(*request) for request in requests}) == len(requests)


def test_what_does_not_change_the_video_does_not_change_its_fingerprint():
    licensed = replace(IDENTITY, licence="MIT", distillation="allowed", paid=True)
    one, other = (fingerprint("a", identity, VideoConfig(), 7, 0) for identity in (IDENTITY, licensed))
    assert one == other


def test_a_request_seed_is_a_function_of_recipe_seed_prompt_take_and_generation():
    digest = hashlib.sha256(b"5/p1/2/0").digest()
    assert request_seed(5, "p1", 2) == int.from_bytes(digest[:8], "big") % 2**31
    assert len({request_seed(s, p, t, g) for s in (0, 1) for p in ("a", "b") for t in (0, 1) for g in (0, 1)}) == 16


def test_takes_are_counted_by_split():
    recipe = DataConfig(
        out="x",
        prompts=PromptsConfig(source="p.txt"),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(takes=3, eval_takes=1),
    )
    prompts = [Prompt("pa", "a", "train"), Prompt("pb", "b", "validation"), Prompt("pc", "c", "test")]
    keys = [sample.key for sample in plan_samples(recipe, prompts, IDENTITY)]
    assert keys == ["pa-00", "pa-01", "pa-02", "pb-00", "pc-00"]
