"""Prompts: the same whatever the file, split by text alone, leaks refused."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from afd_data.config import FolderConfig, PromptsConfig
from afd_data.errors import UserError
from afd_data.prompts import Prompt, find_leaks, known_splits, load_prompts, normalise
from afd_data.teachers.folder import Folder

TEXTS = [f"Scene {number}: a ball of kind {number * 7} rolls {number} times" for number in range(40)]


def txt(folder: Path, texts: list[str] = TEXTS, name: str = "p.txt") -> Path:
    (folder / name).write_text("\n".join(texts), encoding="utf-8")
    return folder


def load(folder: Path, **settings: object) -> list[Prompt]:
    return load_prompts(PromptsConfig(**({"source": "p.txt"} | settings)), folder)  # type: ignore[arg-type]


def write_table(folder: Path, kind: str, texts: list[str]) -> None:
    if kind == "txt":
        txt(folder, ["# a comment", "", *texts])
    elif kind == "csv":
        (folder / "p.csv").write_text("id,prompt\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    elif kind == "jsonl":
        (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"prompt": texts}), folder / "p.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str) -> None:
    write_table(tmp_path, "txt", TEXTS)
    write_table(tmp_path, kind, TEXTS)
    assert load(tmp_path, source=f"p.{kind}", test=5) == load(tmp_path, test=5)


def test_an_id_is_p_and_16_hex_digits_of_the_text(tmp_path: Path) -> None:
    [prompt] = load(txt(tmp_path, ["  A red\tball \u200b "]))
    assert prompt == Prompt("p" + hashlib.sha256(b"A red ball").hexdigest()[:16], "A red ball", "train")


def test_normalising_composes_letters_and_drops_control_characters() -> None:
    assert normalise("Cafe\u0301 \x00on\u00a0\n a\x07 hill\ufeff", "here") == "Caf\u00e9 on a hill"


def test_duplicates_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert len(load(txt(tmp_path, ["one ball", "one  ball", "two balls"]))) == 2
    assert "1 duplicates of 3 prompts" in caplog.text


def test_splits_are_exact_disjoint_and_independent_of_the_files_order(tmp_path: Path) -> None:
    first = load(txt(tmp_path), validation=6, test=5)
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    assert load(txt(tmp_path, shuffled), validation=6, test=5) == first
    splits = [prompt.split for prompt in first]
    assert [splits.count(name) for name in ("train", "validation", "test")] == [29, 6, 5]
    assert len({prompt.id for prompt in first}) == 40


def test_a_new_prompt_moves_at_most_one_old_one_between_splits(tmp_path: Path) -> None:
    before = {prompt.text: prompt.split for prompt in load(txt(tmp_path), test=5)}
    after = {prompt.text: prompt.split for prompt in load(txt(tmp_path, [*TEXTS, "a new one"]), test=5)}
    assert sum(before[text] != after[text] for text in TEXTS) <= 1


def test_a_larger_limit_keeps_the_test_set(tmp_path: Path) -> None:
    few, many = (
        {prompt.id for prompt in load(txt(tmp_path), test=5, limit=limit) if prompt.split == "test"}
        for limit in (10, 30)
    )
    assert few == many


def test_test_source_replaces_holding_out(tmp_path: Path) -> None:
    txt(tmp_path, ["another thing", "and one more thing"], "t.txt")
    prompts = load(txt(tmp_path), test_source="t.txt", validation=3)
    assert {p.text for p in prompts if p.split == "test"} == {"another thing", "and one more thing"}
    assert sum(p.split == "train" for p in prompts) == 37


@pytest.mark.parametrize(
    "leak", ["Scene 3: a ball of kind 21 rolls 3 times", "scene 3, A BALL of kind 21 rolls 3 times!"]
)
def test_evaluation_prompts_in_training_are_refused(tmp_path: Path, leak: str) -> None:
    txt(tmp_path, [leak], "t.txt")
    with pytest.raises(UserError, match=r"1 evaluation prompts occur in training(.|\n)*1\.00  .*3 times"):
        load(txt(tmp_path), test_source="t.txt")


def test_an_allowed_exact_leak_stays_in_evaluation_only(tmp_path: Path) -> None:
    txt(tmp_path, TEXTS[:1], "t.txt")
    prompts = load(txt(tmp_path), test_source="t.txt", allow_leakage=True)
    assert [p.split for p in prompts if p.text == TEXTS[0]] == ["test"]
    assert len({p.id for p in prompts}) == len(prompts) == 40


def test_similarity_is_shared_word_triples_over_all() -> None:
    # triples of "a b c d e": 3, of "a b c d f": 3, shared 2, together 4
    [leak] = find_leaks(["A, b c d e!"], ["a b c d f"], threshold=0.5)
    assert leak.similarity == 0.5
    assert find_leaks(["a b c d e"], ["a b c d f"], threshold=0.51) == []


def test_rare_triples_find_every_pair_that_comparing_all_finds() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abc", k=12)) for _ in range(300)]
    train, evaluation = sorted(set(texts[50:])), sorted(set(texts[:50]))

    def triples(text: str) -> set:
        return {text[i : i + 5] for i in range(0, len(text) - 4, 2)}

    def similar(a: str, b: str) -> bool:
        return len(triples(a) & triples(b)) / len(triples(a) | triples(b)) >= 0.4

    expected = {(e, t) for e in evaluation for t in train if similar(e, t)}
    assert {leak[1:] for leak in find_leaks(train, evaluation, 0.4)} == expected
    assert len(expected) > 20


def test_captions_of_a_folder_are_prompts(tmp_path: Path) -> None:
    teacher = Folder(FolderConfig(path=str(Path(__file__).parents[1] / "data" / "clips")))
    prompts = load_prompts(PromptsConfig(source="teacher", test=1), tmp_path, teacher)
    assert sorted(prompt.text[:17] for prompt in prompts) == ["A young man in a ", "An animated big g"]


BAD = {
    "no file": ("q.txt", b"", r"no file q\.txt in .*Did you mean 'p\.txt'"),
    "kind": ("p.docx", b"x", "unknown kind of file; use .txt, .csv"),
    "no prompts": ("p.txt", b"# nothing\n\n", "holds no prompts"),
    "not utf-8": ("p.txt", b"ok\n\xff\xfe\n", "not UTF-8 at byte 3"),
    "overlong": ("p.txt", b"fine\n" + b"x" * 4001, r"p\.txt:2: the prompt has 4001 characters; at most 4000"),
    "column": (
        "p.csv",
        b"promt,id\na,1\n",
        r"p\.csv:1: no column 'prompt'. Did you mean 'promt'.*Columns: 'promt', 'id'",
    ),
    "empty cell": ("p.csv", b"id,prompt\n1,fine\n2, \n", r"p\.csv:3: column 'prompt': the prompt is empty"),
    "not json": ("p.jsonl", b'{"prompt": "fine"}\n{"prompt": \n', r"p\.jsonl:2: not JSON"),
    "key": ("p.jsonl", b'{"text": "fine"}\n', r"p\.jsonl:1: no column 'prompt'.*Columns: 'text'"),
    "number": ("p.jsonl", b'{"prompt": 3}\n', r"p\.jsonl:1: prompt is int, expected text"),
    "endless number": ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", r"p\.jsonl:1: not JSON"),
    "surrogate": ("p.jsonl", b'{"prompt": "a \\ud800 b"}\n', r"p\.jsonl:1: key 'prompt': half a character"),
    "not parquet": ("p.parquet", b"PAR1 no", r"p\.parquet: not a parquet file"),
    "hub": ("hf://datasets/only-a-name", b"", "expected hf://datasets/OWNER/NAME"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    source, content, message = BAD[case]
    txt(tmp_path)
    if content:
        (tmp_path / source).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, source=source)


def test_a_test_source_that_is_too_small_is_the_one_named(tmp_path: Path) -> None:
    txt(tmp_path, ["one ball"], "other.txt")
    with pytest.raises(UserError, match=r"1 prompts in other\.txt are too few for test 2"):
        load(txt(tmp_path), test=2, test_source="other.txt")


def test_too_few_prompts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 prompts in p\.txt are too few: validation 1 and test 1 leave 0"):
        load(txt(tmp_path, ["one ball", "two balls"]), validation=1, test=1)


# A source that grows


def known_of(prompts: list[Prompt]) -> dict[str, str]:
    return {prompt.id: prompt.split for prompt in prompts}


def test_prompts_that_a_cache_holds_keep_their_split_when_the_source_grows(tmp_path: Path) -> None:
    before = load(txt(tmp_path), test=5, validation=4)
    grown = [*TEXTS, *(f"A new prompt about thing {n} and its {n * 3} friends" for n in range(60))]
    after = load_grown(tmp_path, grown, known_of(before), test=5, validation=4)
    kept = {prompt.id: prompt.split for prompt in after if prompt.text in TEXTS}
    assert kept == known_of(before)
    assert {prompt.split for prompt in after if prompt.text not in TEXTS} == {"train"}  # no place is free


def load_grown(folder: Path, texts: list[str], known: dict[str, str], **settings: object) -> list[Prompt]:
    txt(folder, texts)
    return load_prompts(PromptsConfig(**({"source": "p.txt"} | settings)), folder, None, known)  # type: ignore[arg-type]


def test_free_places_are_filled_from_new_prompts_by_hash(tmp_path: Path) -> None:
    before = load(txt(tmp_path, TEXTS[:20]), test=2)
    after = load_grown(tmp_path, TEXTS, known_of(before), test=4)
    test = [prompt for prompt in after if prompt.split == "test"]
    assert [prompt.id in known_of(before) for prompt in test].count(True) == 2
    new = [prompt.text for prompt in load(txt(tmp_path, TEXTS[20:]), test=2) if prompt.split == "test"]
    assert [prompt.text for prompt in test if prompt.id not in known_of(before)] == new


def test_only_new_prompts_can_be_held_out_later(tmp_path: Path) -> None:
    before = load(txt(tmp_path), test=2)
    with pytest.raises(UserError, match="Only new prompts can be held out"):
        load_grown(tmp_path, TEXTS, known_of(before), test=3)


def test_a_known_prompt_keeps_its_place_within_the_limit(tmp_path: Path) -> None:
    before = load(txt(tmp_path, TEXTS[:10]), limit=10)
    after = load_grown(tmp_path, TEXTS, known_of(before), limit=12)
    assert len(after) == 12
    assert known_of(before).keys() <= known_of(after).keys()


def test_a_prompt_that_was_trained_on_is_a_leak_when_a_test_source_names_it(tmp_path: Path) -> None:
    before = load(txt(tmp_path))
    txt(tmp_path, TEXTS[:1], "t.txt")
    with pytest.raises(UserError, match="1 evaluation prompts occur in training"):
        load_grown(tmp_path, TEXTS, known_of(before), test_source="t.txt")


def test_the_splits_of_a_cache_are_known_from_journal_parts_and_index(playground_cache: Path, tmp_path: Path) -> None:
    expected = known_splits(playground_cache)
    assert sorted(expected.values()) == ["train"] * 12 + ["validation"] * 4
    (tmp_path / "copy").mkdir()
    shutil.copytree(playground_cache / "index", tmp_path / "copy" / "index")
    assert known_splits(tmp_path / "copy") == expected
    part = tmp_path / "parts" / "0000-of-0001"
    part.mkdir(parents=True)
    shutil.copy(playground_cache / "journal.sqlite", part)
    assert known_splits(tmp_path) == expected
    assert known_splits(tmp_path / "none") == {}
