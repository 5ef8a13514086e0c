"""Shares of a plan: whose a prompt is, what a share may spend, and which folders are refused."""

from pathlib import Path

import pytest

from afd_data.config import ArkConfig, CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig
from afd_data.errors import UserError
from afd_data.journal import JOURNAL, Journal
from afd_data.partition import MERGE, Partition, check_parts, parts_of
from afd_data.plan import Planned
from afd_data.prompts import prompt_id
from afd_data.provider_config import TrafficConfig

IDS = [prompt_id(f"a red ball, {n}") for n in range(1000)]


def recipe(**cache) -> DataConfig:
    teacher = ArkConfig(model="any", traffic=TrafficConfig(requests_per_minute=60.0))
    return DataConfig(
        out="unused", prompts=PromptsConfig(source="unused.txt"), teacher=teacher, cache=CacheConfig(**cache)
    )


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_prompt_belongs_to_one_share(count):
    shares = [Partition(index, count) for index in range(count)]
    assert all(sum(share.has(name) for share in shares) == 1 for name in IDS)


def test_shares_are_about_equal():
    sizes = [sum(Partition(index, 8).has(name) for name in IDS) for index in range(8)]
    assert sum(sizes) == 1000
    assert max(abs(size - 125) for size in sizes) < 45  # 4 standard deviations of a fair draw


def test_a_share_is_parsed():
    assert Partition.parse("3/8") == Partition(3, 8)


@pytest.mark.parametrize("text", ["8/8", "-1/8", "1", "a/b", "0/0", "1/2/3"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="expected INDEX/COUNT"):
        Partition.parse(text)


def test_a_folder_tells_its_share():
    share = Partition(3, 8)
    assert share.folder(Path("cache")) == Path("cache/parts/0003-of-0008")
    assert Partition.of(share.folder(Path("cache"))) == share
    assert Partition.of(Path("cache")) is None
    assert Partition.of(Path("elsewhere/0003-of-0008")) is None


def test_money_and_rate_are_divided():
    share = Partition(0, 4).share_of(recipe(max_cost=10.0))
    assert share.cache.max_cost == 2.5
    assert isinstance(share.teacher, ArkConfig)
    assert share.teacher.traffic.requests_per_minute == 15.0


def test_what_the_common_cache_has_spent_is_not_shared(tmp_path):
    journal = Journal(tmp_path / JOURNAL)
    journal.plan([Planned("k", 0, "train", "p01", "a ball", 0, 1, "f")])
    journal.move(1, "intent", estimate=4.0, currency="USD")
    journal.close()
    assert Partition(0, 4).share_of(recipe(max_cost=10.0), tmp_path).cache.max_cost == 1.5
    assert Partition(0, 4).share_of(recipe(max_cost=3.0), tmp_path).cache.max_cost == 0.0


def test_no_limits_stay_none():
    plain = recipe().model_copy(update={"teacher": PlaygroundConfig()})
    share = Partition(0, 4).share_of(plain)
    assert share.cache.max_cost is None
    assert share.teacher == plain.teacher


def test_parts_of_another_number_are_refused(tmp_path):
    Partition(0, 2).folder(tmp_path).mkdir(parents=True)
    check_parts(tmp_path, Partition(1, 2))
    with pytest.raises(UserError, match="partitioned by 2, not 3"):
        check_parts(tmp_path, Partition(1, 3))
    with pytest.raises(UserError, match="not merged"):
        check_parts(tmp_path, None)


def test_a_cache_in_which_a_merge_was_broken_off_is_refused(tmp_path):
    (tmp_path / MERGE).write_text("[]")
    for share in (None, Partition(0, 2)):
        with pytest.raises(UserError, match="merge"):
            check_parts(tmp_path, share)


def test_only_whole_parts_count(tmp_path):
    for name in ("0000-of-0002", "0001-of-0002.old", "other"):
        (tmp_path / "parts" / name).mkdir(parents=True)
    assert [part.name for part in parts_of(tmp_path)] == ["0000-of-0002"]
