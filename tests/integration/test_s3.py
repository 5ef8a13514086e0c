"""A cache whose storage is S3, spoken by s3fs with moto's server: made, read, verified, and repaired after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from afd_data.config import CacheConfig, DataConfig, PlaygroundConfig, PromptsConfig, StreamConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.inspection import inspect, verify
from afd_data.leases import Lease, live_generations
from afd_data.origin import local_head, sizes, update_head
from afd_data.prompts import Prompt
from afd_data.shards import read_manifest
from afd_data.storage import Storage, open_storage
from afd_data.stream import Stream
from tests.integration.test_cache_kill import CHILDREN, finished, members

URL = "s3://videos/mine"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")

# Arguments: folder, address or "", what to die at ("" or the name of a file that is sent), before or after.
SCRIPT = CHILDREN.replace("shard_samples):", "shard_samples, storage):").replace(
    "CacheConfig(shard_samples=shard_samples)", "CacheConfig(shard_samples=shard_samples, storage=storage)"
)
RUN = (
    SCRIPT
    + """
from afd_data.storage import Storage

folder, url, victim, moment = sys.argv[1:5]
send = Storage._put


def dying(self, source, file):
    if file == victim and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, source, file)
    if file == victim and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)


Storage._put = dying
cache(folder, 9, 3, url or None)
"""
)

# Children die at their n-th durable step or upload, for POINTS n spread evenly over all that there are.
POINTS = 10
SOME_STEPS = (
    SCRIPT
    + """
from afd_data.storage import Storage

root, count, points = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def run(step):
    cache(root / f"step-{step:03d}", count, 2, f"file://{root}/at-{step:03d}")


def dies_at(step):
    countdown = Countdown(step)
    Storage._put = countdown.counting(Storage._put)
    run(step)
    (root / "steps").write_text(str(step - countdown.left))


assert exit_code(fork(lambda: dies_at(999))) == 0
steps = int((root / "steps").read_text())
for point in range(points):
    step = (2 * point + 1) * steps // (2 * points)
    assert exit_code(fork(lambda: dies_at(step))) == KILLED
    assert exit_code(fork(lambda: run(step))) == 0
"""
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; returns the address of a cache in it."""
    import s3fs

    environment = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "VERYSECRET",
                   "AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                   "AFD_HOME": str(tmp_path / "home")}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    open_storage.cache_clear()
    files = s3fs.S3FileSystem()
    if files.exists("videos"):
        files.rm("videos", recursive=True)
    files.mkdir("videos")
    return URL


def make(folder: Path, url: str | None, count: int = 9) -> None:
    from afd_data.cache import cache_teacher
    from afd_data.teachers import open_teacher

    recipe = DataConfig(
        out="unused",
        prompts=PromptsConfig(source="unused.txt"),
        teacher=PlaygroundConfig(),
        video=VideoConfig(lossless=True),
        cache=CacheConfig(shard_samples=3, storage=url),
    )
    prompts = [
        Prompt(f"p{n:04d}", f"a {COLOURS[n % 8]} ball falls, {n}", "train" if n % 5 else "test") for n in range(count)
    ]
    cache_teacher(recipe, prompts, folder, open_teacher(recipe.teacher), progress=False)


def run(folder: Path, url: str, victim: str = "", moment: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(folder), url, victim, moment]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_cache_in_s3_holds_what_a_local_one_does(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3)
    make(tmp_path / "here", None)
    head = local_head(s3)
    assert members(head) == members(tmp_path / "here") == members(tmp_path / "there")
    assert not list((tmp_path / "there").glob("**/*.tar"))
    assert not list((tmp_path / "there" / "spool").iterdir())
    assert verify(head) == []
    assert verify(tmp_path / "there") == []


def test_index_and_manifest_are_not_sent_for_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Counter[str] = Counter()
    put = Storage._put

    def counted(storage: Storage, source: Path, file: str) -> None:
        sent[file.split("/")[0]] += 1
        put(storage, source, file)

    monkeypatch.setattr(Storage, "_put", counted)
    make(tmp_path / "here", f"file://{tmp_path}/there")
    assert sent["data"] == len(read_manifest(tmp_path / "here").shards) == 4
    assert (sent["index"], sent["manifest.json"]) == (2, 1)  # an index for each of two splits


def test_a_stream_reads_s3_as_it_reads_a_folder(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3)
    make(tmp_path / "here", None)
    batches = []
    for folder in (local_head(s3), tmp_path / "here"):
        with Stream(folder, StreamConfig(), "train", seed=0) as stream:
            batches.append([(example.key, example.video.tobytes()) for example in stream.next_batch(20)])
    assert batches[0] == batches[1]


def test_a_larger_recipe_adds_to_what_lies_in_s3(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3, count=6)
    head = local_head(s3)
    before = set(sizes(head))
    make(tmp_path / "there", s3, count=9)
    update_head(head)
    assert len(members(head)) == 9
    assert before < set(sizes(head))
    assert verify(head) == []


def test_verify_finds_a_flipped_byte_in_s3(s3: str, tmp_path: Path) -> None:
    import s3fs

    make(tmp_path / "there", s3)
    victim = read_manifest(tmp_path / "there").shards[0].file
    files = s3fs.S3FileSystem()
    data = bytearray(open_storage(s3).read(victim, 0, 10**9))
    data[len(data) // 2] ^= 1
    files.pipe_file(f"{s3}/{victim}", bytes(data))
    problems = verify(local_head(s3))
    assert any(problem.startswith(f"{s3}/{victim}") for problem in problems)


def test_inspect_looks_at_s3(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3)
    assert "9 samples, newest generation 0" in inspect(local_head(s3), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_a_tar_that_is_gone_from_s3_is_named_by_the_next_run(s3: str, tmp_path: Path) -> None:
    import s3fs

    make(tmp_path / "there", s3)
    victim = read_manifest(tmp_path / "there").shards[0].file
    s3fs.S3FileSystem().rm_file(f"{s3}/{victim}")
    with pytest.raises(UserError, match=f"{s3}/{victim}: named in the manifest and gone"):
        make(tmp_path / "there", s3)


def test_a_second_folder_may_not_write_to_the_same_place(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3)
    with pytest.raises(UserError, match=f"{s3}: another cache lies there"):
        make(tmp_path / "other", s3)


def test_no_file_and_no_message_holds_a_key(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import s3fs

    caplog.set_level("DEBUG", "afd_data")
    make(tmp_path / "there", s3)
    head = local_head(s3)
    with Stream(head, StreamConfig(), "train", seed=0) as stream:
        stream.next_batch(3)
    said = []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://AKIAEXAMPLE:VERYSECRET@127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    open_storage.cache_clear()
    for source in (s3, "s3://AKIAEXAMPLE:VERYSECRET@videos/mine"):
        with pytest.raises(UserError) as refused:
            local_head(source)
        said.append(str(refused.value))
    assert "the storage does not answer" in said[0]
    for text in [
        *said,
        caplog.text,
        *(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()),
    ]:
        assert "VERYSECRET" not in text
        assert "AKIAEXAMPLE" not in text


def test_of_two_writers_at_once_one_gets_the_place(s3: str) -> None:
    storage = open_storage(s3)
    storage._put_new(b"first", "mark")
    with pytest.raises((FileExistsError, UserError)):
        storage._tried(lambda: storage._put_new(b"second", "mark"), pauses=())
    assert storage.read("mark", 0, 10) == b"first"


def test_what_a_trainer_reads_in_s3_is_not_pruned(s3: str, tmp_path: Path) -> None:
    make(tmp_path / "there", s3)
    lease = Lease(local_head(s3), 0, "run/train")
    assert live_generations(tmp_path / "there") == {0}
    lease.release()
    assert live_generations(tmp_path / "there") == set()


def test_a_bucket_that_does_not_exist_is_named(s3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://nobody/x: no cache there"):
        local_head("s3://nobody/x")
    with pytest.raises(UserError, match=r"s3://nobody/x: no such bucket or repository; make it first"):
        make(tmp_path / "there", "s3://nobody/x")


def test_missing_credentials_are_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    open_storage.cache_clear()
    with pytest.raises(UserError, match=r"s3://videos/mine: no access .*AWS_ACCESS_KEY_ID"):
        local_head(s3)


@pytest.mark.slow  # starts Python twice
@pytest.mark.parametrize(("victim", "moment"), [("data/train/g0000-000000.tar", "before"), ("manifest.json", "before")])
def test_a_kill_between_upload_and_manifest_is_repaired(s3: str, tmp_path: Path, victim: str, moment: str) -> None:
    killed = run(tmp_path / "there", s3, victim, moment)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert open_storage(s3).size("manifest.json") is None
    make(tmp_path / "there", s3)
    make(tmp_path / "here", None)
    assert members(local_head(s3)) == members(tmp_path / "here")
    assert verify(local_head(s3)) == []


@pytest.mark.slow  # the stage runs twice for each of POINTS steps
def test_a_death_at_any_step_of_publishing_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SOME_STEPS, str(tmp_path), "2", str(POINTS)]
    finished(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    folders = sorted(tmp_path.glob("step-*"))
    assert len(folders) == POINTS + 1
    expected = members(folders[-1])  # its countdown outlasted the run
    assert len(expected) == 2
    for folder in folders:
        there = tmp_path / folder.name.replace("step", "at")
        assert members(there) == members(folder) == expected, folder
        assert verify(there) == [], folder
        assert not list(folder.glob("**/*.tar")), folder
