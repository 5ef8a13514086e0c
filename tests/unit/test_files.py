"""Files that are complete or absent, and folders with one writer."""

import fcntl
import subprocess
import sys
from contextlib import suppress

import pytest

from afd_data.errors import UserError
from afd_data.files import atomic_folder, atomic_write, is_held, one_writer, whole_file

HOLD = """
import sys, time
from pathlib import Path
from afd_data.files import one_writer, whole_file
with one_writer(Path(sys.argv[1]), "cache x"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with suppress(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_block_that_ends_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path, "w") as file:
        file.write("nëw")
    assert path.read_text("utf-8") == "nëw"


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    assert is_held(tmp_path / ".lock")
    message = f"cache x: another afd process .pid {holder.pid}. is writing here"
    with pytest.raises(UserError, match=message), one_writer(tmp_path / ".lock", "cache x"):
        pass


def test_one_who_looks_whether_a_folder_is_held_does_not_hold_it(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_held(tmp_path / ".lock")


def test_looking_makes_no_lock_file_and_needs_no_right_to_write(tmp_path):
    assert not is_held(tmp_path / ".lock")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch(mode=0o444)
    tmp_path.chmod(0o555)
    assert not is_held(tmp_path / ".lock")
    tmp_path.chmod(0o755)


def test_a_killed_writer_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert not is_held(tmp_path / ".lock")
    with one_writer(tmp_path / ".lock", "cache x"):
        assert is_held(tmp_path / ".lock")
    assert not is_held(tmp_path / ".lock")


def test_a_folder_replaces_the_old_one_when_its_block_ends_and_not_when_it_raises(tmp_path):
    with atomic_folder(tmp_path / "new" / "a") as part:
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text("1")
        assert not (tmp_path / "new" / "a").exists()
    assert (tmp_path / "new" / "a" / "deep" / "file").read_text() == "1"
    with suppress(RuntimeError), atomic_folder(tmp_path / "new" / "a") as part:
        (part / "file").write_text("half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "new" / "a").iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_a_folder_whose_replacement_was_killed_between_two_names_comes_back(tmp_path):
    (tmp_path / "a.old").mkdir()
    (tmp_path / "a.old" / "file").write_text("1")
    with suppress(RuntimeError), atomic_folder(tmp_path / "a"):
        raise RuntimeError
    assert (tmp_path / "a" / "file").read_text() == "1"


def test_a_whole_file_appears_when_its_block_ends_and_not_when_it_raises(tmp_path):
    target = tmp_path / "a.mp4"
    with whole_file(target) as part:
        part.write_text("new")
        assert not target.exists()
    with pytest.raises(RuntimeError), whole_file(target) as part:  # noqa: PT012
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
