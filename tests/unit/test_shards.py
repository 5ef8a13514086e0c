"""Shards and manifest: what is written, and what is refused when a stranger wrote it."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from webdataset.compat import WebDataset

from afd_data.errors import UserError
from afd_data.examples import read_places
from afd_data.files import file_sha256
from afd_data.index import index_path, index_rows, read_index, schema, update_index
from afd_data.sample import SCHEMA_VERSION, Sample, parse_sample
from afd_data.shards import (
    MANIFEST,
    MAX_SAMPLES,
    Content,
    Manifest,
    Shard,
    describe_shard,
    read_manifest,
    read_member,
    scan_shard,
    write_manifest,
    write_shard,
)

FILE = "data/train/g0000-000000.tar"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


UNPARSABLE = ["9" * 5000, "[" * 200_000]  # more digits, or deeper, than Python's reader goes


def sample(key: str, **changes) -> Sample:
    values = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "prompt_id": key[:-3],
        "prompt": "a red ball",
        "split": "train",
        "take": 0,
        "generation": 0,
        "fingerprint": "f" * 64,
        "seed": 1,
        "teacher": "someone",
        "teacher_version": "1",
        "requested_json": "{}",
        "effective_json": "{}",
        "provenance_json": "{}",
        "world_json": "{}",
        "licence": "unknown",
        "distillation": "unknown",
        "cost": 0.0,
        "currency": "USD",
        "width": 16,
        "height": 16,
        "frames": 12,
        "fps": 8.0,
        "duration_s": 1.5,
        "video_sha256": EMPTY_SHA256,
        "perceptual_hash": "0" * 16,
    }
    return Sample(**(values | changes))


def content(key: str, created_at: float = 1000.0, **changes) -> Content:
    return Content(key, created_at, b"", sample(key, **changes).to_json())


def sealed(folder, contents) -> Shard:
    shard = write_shard(folder, FILE, contents)
    write_manifest(folder, Manifest().with_shard(shard))
    return shard


def test_what_was_sealed_is_read_back(tmp_path):
    shard = write_shard(tmp_path, FILE, [content("pa-00", 1234.9), content("pb-00")])
    entries = scan_shard(tmp_path / FILE)
    assert [entry.key for entry in entries] == ["pa-00", "pb-00"]
    assert entries[0].created_at == 1234.0
    with open(tmp_path / FILE, "rb") as file:
        assert read_member(file, entries[1], "json") == content("pb-00").json
        assert read_member(file, entries[1], "mp4") == b""
    assert (shard.samples, shard.bytes, shard.sha256) == (
        2,
        (tmp_path / FILE).stat().st_size,
        file_sha256(tmp_path / FILE),
    )


def test_the_offsets_are_those_that_tarfile_finds(tmp_path):
    write_shard(tmp_path, FILE, [content("pa-00"), Content("pb-00", 0.0, b"x" * 700, content("pb-00").json)])
    with tarfile.open(tmp_path / FILE) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    found = {f"{e.key}.{kind}": place for e in scan_shard(tmp_path / FILE) for kind, place in e.members.items()}
    assert found == expected


def test_the_time_of_a_sample_changes_the_tar_and_not_its_members(tmp_path):
    one = write_shard(tmp_path / "one", FILE, [content("pa-00", 1.0)])
    other = write_shard(tmp_path / "other", FILE, [content("pa-00", 2.0)])
    assert one.sha256 != other.sha256
    read = []
    for folder in ("one", "other"):
        with open(tmp_path / folder / FILE, "rb") as file:
            read.append(read_member(file, scan_shard(tmp_path / folder / FILE)[0], "json"))
    assert read[0] == read[1]


def test_a_writer_that_fails_leaves_no_tar(tmp_path):
    def broken():
        yield content("pa-00")
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        write_shard(tmp_path, FILE, broken())
    assert not list((tmp_path / "data" / "train").iterdir())


def test_plain_webdataset_reads_a_shard(tmp_path):
    write_shard(tmp_path, FILE, [content("pa-00"), content("pb-00")])
    samples = list(WebDataset(str(tmp_path / FILE), shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["pa-00", "pb-00"]
    assert samples[0]["json"] == content("pa-00").json


# Tars of strangers


def plain(name: str, data: bytes = b"{}", **changes) -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for attribute, value in changes.items():
        setattr(header, attribute, value)
    return header, data


def write_tar(path, members, form=tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for header, data in members:
            tar.addfile(header, io.BytesIO(data) if header.isreg() else None)


def pair(key: str) -> list:
    return [plain(f"{key}.json"), plain(f"{key}.mp4", b"video")]


HOSTILE = {
    "a path that leaves the folder": ([plain("../pa-00.json")], "is not KEY.mp4 or KEY.json"),
    "an absolute path": ([plain("/etc/pa-00.json")], "is not KEY.mp4 or KEY.json"),
    "a folder in the name": ([plain("x/pa-00.json")], "is not KEY.mp4 or KEY.json"),
    "a dot in the key": ([plain("p.a-00.json")], "is not KEY.mp4 or KEY.json"),
    "capitals in the key": ([plain("PA-00.json")], "is not KEY.mp4 or KEY.json"),
    "a line break in the key": ([plain("pa\n.json")], "is not KEY.mp4 or KEY.json"),
    "a pickle": ([plain("pa-00.pkl")], "is not KEY.mp4 or KEY.json"),
    "a hidden file": ([plain(".json")], "is not KEY.mp4 or KEY.json"),
    "a symbolic link": ([plain("pa-00.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "not a plain file"),
    "a hard link": ([plain("pa-00.json", b"", type=tarfile.LNKTYPE, linkname="pb-00.json")], "not a plain file"),
    "a device": ([plain("pa-00.json", b"", type=tarfile.CHRTYPE)], "not a plain file"),
    "a folder": ([plain("pa-00.json", b"", type=tarfile.DIRTYPE)], "not a plain file"),
    "a member without its other half": ([plain("pa-00.json")], "has no mp4 and json side by side"),
    "two members of one name": ([plain("pa-00.json"), *pair("pa-00")], "two members"),
    "a key that comes back": ([*pair("pa-00"), *pair("pb-00"), *pair("pa-00")], "occurs twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_is_refused(tmp_path, case):
    members, message = HOSTILE[case]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_long_name_in_an_extension_header_is_refused(tmp_path, form):
    write_tar(tmp_path / "x.tar", pair("p" * 110), form)
    with pytest.raises(UserError, match="not a plain file"):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize(("name", "size"), [("pa-00.mp4", 5 * 2**30), ("pa-00.json", 2**33 - 1)])
def test_a_huge_size_is_refused_without_reading_it(tmp_path, name, size):
    header, _ = plain(name, size=size)
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=f"claims {size} bytes"):
        scan_shard(tmp_path / "x.tar")


def test_a_size_beyond_the_end_of_the_file_is_truncation(tmp_path):
    header, _ = plain("pa-00.json", size=10_000)
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="truncated in 'pa-00"):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize("cut", [100, 512, 600, 1024, 1536, 1600, 2048])
def test_a_tar_cut_off_anywhere_is_refused(tmp_path, cut):
    write_tar(tmp_path / "x.tar", pair("pa-00"))  # two headers and two members of 512 bytes each
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated"):
        scan_shard(tmp_path / "x.tar")


def test_data_hidden_behind_the_end_is_refused(tmp_path):
    write_tar(tmp_path / "x.tar", pair("pa-00"))
    with open(tmp_path / "x.tar", "ab") as file:
        file.write(b"x" * 20_000)
    with pytest.raises(UserError, match="behind the end of the archive"):
        scan_shard(tmp_path / "x.tar")


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match="no tar header at byte 0"):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "pz-00", "prompt_id": "pz"}, "pa-00.json says key, split, generation"),
        ({"split": "test"}, "pa-00.json says key, split, generation"),
        ({"generation": 3}, "pa-00.json says key, split, generation"),
        ({"video_sha256": "0" * 64}, "is not the video that its JSON was written for"),
        ({"schema_version": 2}, "schema version 2, this afd reads 1"),
    ],
)
def test_a_sample_that_contradicts_its_place_is_refused(tmp_path, changes, message):
    json_bytes = json.loads(content("pa-00").json) | changes
    sealed(tmp_path, [Content("pa-00", 0.0, b"", json.dumps(json_bytes).encode())])
    with pytest.raises(UserError, match=message):
        update_index(tmp_path)


# Manifest and index


def test_a_folder_without_manifest_is_an_empty_cache(tmp_path):
    assert read_manifest(tmp_path) == Manifest()


def test_the_manifest_is_read_back_as_it_was_written(tmp_path):
    shard = sealed(tmp_path, [content("pa-00"), content("pb-00")])
    manifest = read_manifest(tmp_path)
    assert manifest.shards == (shard,)
    assert manifest.samples() == {"train": 2}
    assert describe_shard(tmp_path, FILE) == shard


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, r"manifest version 1, this afd reads 2.*afd cache migrate"),
        ({"shards": [{}]}, "not a manifest"),
        ({"shards": None}, "not a manifest"),
        ({"file": "../../etc/passwd"}, "is not the name of a shard"),
        ({"file": "data/test/g0000-000000.tar"}, "is not the name of a shard of 'train'"),
        ({"generation": 1}, "is not the name of a shard"),
        ({"generation": "abc"}, "generation is str, expected int"),
        ({"samples": "5"}, "samples is str, expected int"),
    ],
)
def test_a_manifest_that_says_otherwise_is_refused(tmp_path, change, message):
    sealed(tmp_path, [content("pa-00")])
    record = json.loads((tmp_path / MANIFEST).read_bytes())
    if change.keys() <= {"file", "generation", "samples"}:
        record["shards"][0] |= change
    else:
        record |= change
    (tmp_path / MANIFEST).write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_a_manifest_cut_off_is_refused(tmp_path):
    sealed(tmp_path, [content("pa-00")])
    (tmp_path / MANIFEST).write_bytes((tmp_path / MANIFEST).read_bytes()[:50])
    with pytest.raises(UserError, match="not a manifest"):
        read_manifest(tmp_path)


def test_a_generation_that_is_no_number_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text('{"version": 2, "generation": "abc", "shards": [], "pruned": []}')
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest.*generation is str, expected int"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", UNPARSABLE)
def test_a_manifest_that_python_cannot_parse_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", UNPARSABLE)
def test_a_sample_that_python_cannot_parse_is_refused(text):
    with pytest.raises(UserError, match=r"pa-00\.json: not JSON"):
        parse_sample(text.encode(), "pa-00.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"take": 2**63}, "take is an integer of more than 64 bits"), ({"licence": "\ud800"}, "surrogate.* in licence")],
)
def test_a_sample_that_the_index_cannot_hold_is_refused(changes, message):
    record = json.loads(content("pa-00").json) | changes
    with pytest.raises(UserError, match=message):
        parse_sample(json.dumps(record).encode(), "pa-00.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_id": "../../x", "key": "pa-00"}, r"key 'pa-00' is not of take 0 of prompt '../../x'"),
        ({"take": 1}, "key 'pa-00' is not of take 1 of prompt 'pa'"),
        ({"take": -1, "key": "pa--1", "prompt_id": "pa "}, "is not of take -1"),
        ({"distillation": "yes"}, "distillation is 'yes', not allowed, disallowed, unknown"),
    ],
)
def test_a_sample_whose_names_or_terms_are_none_of_ours_is_refused(changes, message):
    record = json.loads(content("pa-00").json) | changes
    with pytest.raises(UserError, match=message):
        parse_sample(json.dumps(record).encode(), "pa-00.json")


@pytest.mark.parametrize("rows", ["many", "long"])
def test_an_index_that_unpacks_to_much_is_refused_without_unpacking_it(tmp_path, rows):
    sealed(tmp_path, [content("pa-00")])
    update_index(tmp_path)
    path = index_path(tmp_path, "train")
    row = read_index(tmp_path, "train").to_pylist()[0] | ({"prompt": "x" * 10_000} if rows == "long" else {})
    count = 40_000 if rows == "long" else MAX_SAMPLES + 1
    columns = [
        pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int32), pyarrow.array([row[field.name]], field.type))
        for field in schema()
    ]
    table = pyarrow.table(columns, names=schema().names)
    pyarrow.parquet.write_table(table, path, store_schema=False, row_group_size=count)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"than an index of afd has|to more in row group 0 than afd writes"):
        read_index(tmp_path, "train")


def test_a_shard_that_is_also_named_as_pruned_is_refused(tmp_path):
    shard = sealed(tmp_path, [content("pa-00")])
    write_manifest(tmp_path, Manifest(shards=(shard,), pruned=(shard,)))
    with pytest.raises(UserError, match="names a shard twice"):
        read_manifest(tmp_path)


def test_the_name_of_a_pruned_shard_is_not_given_again():
    pruned = Shard(FILE, "train", 0, 1, 1, EMPTY_SHA256)
    assert Manifest(pruned=(pruned,)).next_file("train", 0) == "data/train/g0000-000001.tar"


def index_of(folder, count: int, last_samples: int = 1) -> list[str]:
    """A cache of `count` tars with its index; the tar of each row, in order."""
    manifest = Manifest()
    for number in range(count):
        keys = [f"p{number}{letter}-00" for letter in "ab"[: last_samples if number == count - 1 else 1]]
        file = f"data/train/g0000-{number:06d}.tar"
        manifest = manifest.with_shard(write_shard(folder, file, [content(key) for key in keys]))
    write_manifest(folder, manifest)
    update_index(folder)
    return read_index(folder, "train")["shard"].to_pylist()


def test_the_index_has_a_row_group_for_each_shard(tmp_path):
    assert len(index_of(tmp_path, 3, last_samples=2)) == 4
    with pyarrow.parquet.ParquetFile(index_path(tmp_path, "train")) as file:
        assert [file.metadata.row_group(number).num_rows for number in range(3)] == [1, 1, 2]


def test_known_shards_are_not_read_again_for_the_index(tmp_path):
    index_of(tmp_path, 2)
    (tmp_path / FILE).unlink()
    manifest = read_manifest(tmp_path)
    new = write_shard(tmp_path, "data/train/g0000-000002.tar", [content("pz-00")])
    write_manifest(tmp_path, manifest.with_shard(new))
    update_index(tmp_path)
    assert read_index(tmp_path, "train")["key"].to_pylist() == ["p0a-00", "p1a-00", "pz-00"]


def test_a_pruned_shard_leaves_the_index(tmp_path):
    index_of(tmp_path, 3)
    manifest = read_manifest(tmp_path)
    first, *others = manifest.shards
    write_manifest(tmp_path, Manifest(0, tuple(others), (first,)))
    update_index(tmp_path)
    assert read_index(tmp_path, "train")["key"].to_pylist() == ["p1a-00", "p2a-00"]


def test_an_index_of_another_layout_is_made_again(tmp_path):
    index_of(tmp_path, 3)
    whole = read_index(tmp_path, "train")
    pyarrow.parquet.write_table(whole, index_path(tmp_path, "train"))  # all rows in one group
    update_index(tmp_path)
    assert read_index(tmp_path, "train") == whole
    with pyarrow.parquet.ParquetFile(index_path(tmp_path, "train")) as file:
        assert file.num_row_groups == 3


def test_a_shard_of_a_round_that_is_not_complete_is_indexed_and_is_no_data(tmp_path):
    shard = sealed(tmp_path, [content("pa-00")])
    later = write_shard(tmp_path, "data/train/g0001-000000.tar", [content("pa-00", generation=1)])
    write_manifest(tmp_path, Manifest(0, (shard, later)))
    update_index(tmp_path)
    assert read_index(tmp_path, "train")["generation"].to_pylist() == [0, 1]
    assert read_places(tmp_path, "train")["pa-00"].shard == shard
    write_manifest(tmp_path, Manifest(1, (shard, later)))
    assert read_places(tmp_path, "train")["pa-00"].shard == later
    assert read_places(tmp_path, "train", generation=0)["pa-00"].shard == shard


def test_a_row_of_the_index_that_is_read_in_columns_has_these_only(tmp_path):
    index_of(tmp_path, 1)
    assert list(index_rows(tmp_path, "train", ["take", "key"])) == [{"take": 0, "key": "p0a-00"}]


def test_the_index_points_at_the_bytes_of_every_member(tmp_path):
    sealed(tmp_path, [content("pa-00", 77.0), content("pb-00")])
    update_index(tmp_path)
    rows = read_index(tmp_path, "train").to_pylist()
    assert [row["key"] for row in rows] == ["pa-00", "pb-00"]
    assert rows[0]["created_at"] == 77.0
    data = (tmp_path / rows[1]["shard"]).read_bytes()
    start = rows[1]["json_offset"]
    assert data[start : start + rows[1]["json_size"]] == content("pb-00").json
    assert rows[1]["mp4_sha256"] == EMPTY_SHA256
