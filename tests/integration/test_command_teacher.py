"""Teacher `command`: real programs, through `afd cache-teacher` and alone."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from afd_data.acceptance import RejectedError
from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.index import read_index
from afd_data.journal import open_journal
from afd_data.teacher_config import CommandConfig
from afd_data.teachers import Delivery, FailedError, RefusedError, Request, programs
from afd_data.teachers.command import Command
from afd_data.video import read_video

VIDEO = VideoConfig(lossless=True)  # 16x16, 12 frames at 8 fps
# Draws noise that moves; what it does otherwise is the prompt's last word.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from afd_data.config import VideoConfig
from afd_data.video import write_mp4

prompt, seed, output, width, height, frames, fps = sys.argv[1:]
assert sys.stdin.read() == prompt
match prompt.split()[-1]:
    case "refuse":
        print("moderation:", file=sys.stderr)
        sys.exit(65)
    case "later":
        print("a long story", "the oven is cold", file=sys.stderr, sep="\\n")
        sys.exit(75)
    case "nothing":
        sys.exit()
video = VideoConfig(width=int(width), height=int(height), frames=int(frames), fps=float(fps), lossless=True)
picture = np.random.default_rng(int(seed)).integers(0, 255, (video.height, video.width, 3), np.uint8)
write_mp4(Path(output), np.stack([np.roll(picture, n, axis=1) for n in range(video.frames)]), video)
"""
ARGUMENTS = ("{prompt}", "{seed}", "{output}", "{width}", "{height}", "{frames}", "{fps}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "draw.py"
    path.write_text(PROGRAM)
    return path


def asked(prompt: str = "a 'red' ball; $HOME", seed: int = 7) -> Request:
    return Request("f" * 64, "p0", prompt, 0, seed, VIDEO)


def command(*argv: str, **settings: Any) -> Command:
    return Command(CommandConfig(argv=argv, **settings))


def run(script: str, target: Path, prompt: str = "a ball", **settings: Any) -> Delivery:
    """A shell's script; $0 is where it writes."""
    teacher = command("sh", "-c", script, "{output}", **settings)
    return teacher.fetch("x", asked(prompt), target)


def test_a_cache_of_a_programs_videos(program: Path, afd: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a ball\na cube\nplease refuse\nrather later\nmake nothing\n")
    recipe = {
        "out": str(tmp_path / "out"),
        "video": {"lossless": True},
        "prompts": {"source": "prompts.txt"},
        "teacher": {"name": "command", "argv": [sys.executable, str(program), *ARGUMENTS]},
    }
    (tmp_path / "program.yaml").write_text(json.dumps(recipe))
    result = afd("cache-teacher", tmp_path / "program.yaml")
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(read_index(tmp_path / "out" / "cache", "train")) == 2
    journal = open_journal(tmp_path / "out" / "cache")
    ends = {row.prompt: (row.state, row.reason) for row in journal.rows()}
    journal.close()
    assert ends["please refuse"] == ("refused", "refused: the program refuses: moderation:")
    assert ends["rather later"] == ("failed", "failed: exit code 75: a long story / the oven is cold")
    assert ends["make nothing"] == ("failed", "failed: the program ended well and wrote no video to {output}")
    assert [path.name for path in (tmp_path / "out" / "cache" / "spool").iterdir()] == []


def test_placeholders_are_filled_in_without_a_shell(program: Path, tmp_path: Path) -> None:
    teacher = command(sys.executable, str(program), *ARGUMENTS)
    request = asked()
    delivery = teacher.fetch(teacher.submit(request), request, tmp_path / "a.mp4")
    picture = np.random.default_rng(7).integers(0, 255, (16, 16, 3), np.uint8)
    assert np.array_equal(read_video(tmp_path / "a.mp4").frames[1], np.roll(picture, 1, axis=1))
    assert delivery.provenance == {"program": Path(sys.executable).name, "seed": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(FailedError, match=r"^killed after 0\.3 s: half way$"):
        run(f"echo half way >&2; (sleep 1; touch {tmp_path}/late) & sleep 60", tmp_path / "a.mp4", timeout_s=0.3)
    assert time.monotonic() - started < 5
    time.sleep(1.1)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo no >&2; exit 65", RefusedError, "the program refuses: no"),
        ("exit 75", FailedError, "exit code 75"),
        ("printf 'a\\nb\\n\\nc\\nd' >&2; exit 3", FailedError, "exit code 3: b / c / d"),
        ("kill -9 $$", FailedError, "killed by SIGKILL"),
        ("true", FailedError, r"wrote no video to \{output\}"),
        (": > $0", FailedError, r"wrote no video to \{output\}"),
        ("echo '<html>sorry' > $0", RejectedError, "undecodable: the program's video: an HTML page"),
    ],
)
def test_how_a_program_ends_decides(tmp_path: Path, script: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^.*{message}"):
        run(script, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_programs_can_be_ended_all_at_once(tmp_path: Path) -> None:
    def end() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        programs.kill_all()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(FailedError, match="killed by SIGKILL"):
        run(f"(sleep 1; touch {tmp_path}/late) & touch {tmp_path}/begun; wait", tmp_path / "a.mp4")
    ending.join()
    time.sleep(1.1)
    assert not (tmp_path / "late").exists()


INTERRUPTED_TWICE = """
import sys
from pathlib import Path
from afd_data.cache import cache_teacher
from afd_data.config import DataConfig
from afd_data.prompts import Prompt
from afd_data.teacher_config import CommandConfig
from afd_data.teachers.command import Command

folder = Path(sys.argv[1])
script = f"touch {folder}/begun; sleep 1.5; touch {folder}/late"
teacher = CommandConfig(argv=("sh", "-c", script, "{output}"))
recipe = DataConfig(out="unused", prompts={"source": "unused.txt"}, teacher=teacher)
cache_teacher(recipe, [Prompt("p0", "a ball", "train")], folder / "cache", Command(teacher), progress=False)
"""


@pytest.mark.slow  # starts a process, and sees that its program is gone after the time it would have taken
def test_ctrl_c_twice_ends_the_programs_too(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", INTERRUPTED_TWICE, str(tmp_path)], stderr=subprocess.PIPE)
    while run.poll() is None and not (tmp_path / "begun").exists():
        time.sleep(0.01)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130, said.decode()
    time.sleep(1.6)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("name", ["MY_API_KEY", "SMTP_PASS", "BASIC_AUTH", "CLOUD_CREDENTIALS", "A_TOKEN"])
def test_secrets_of_the_environment_do_not_get_into_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "sk-very-secret")
    with pytest.raises(FailedError, match=r"^exit code 1: 401 for \*\*\*$"):
        run(f"echo 401 for ${name} >&2; exit 1", tmp_path / "a.mp4")


def test_a_program_that_does_not_read_its_input_is_no_problem(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="exit code 4"):
        run("exec <&-; exit 4", tmp_path / "a.mp4", prompt="word " * 800)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("no-such-program", "{output}"), r"teacher\.argv: no program 'no-such-program' that can be run"),
        (("sh", "{out}"), r"teacher\.argv: unknown placeholder \{out\}\. There are prompt, "),
        (("sh", "{prompt.x}", "{output}"), r"unknown placeholder \{prompt\.x\}"),
        (("awk", "{print $1}", "{output}"), "a brace that is meant as such is written twice"),
        (("sh", "{output"), "a brace that is meant as such is written twice"),
        (("sh", "{prompt:05d}", "{output}"), "a brace that is meant as such is written twice"),
        (("sh", "{prompt}"), r"\{output\} does not occur in it"),
    ],
)
def test_a_command_that_cannot_work_is_refused_when_it_is_opened(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(*argv)


def test_a_file_that_the_system_cannot_run_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x7fELF nonsense")
    os.chmod(tmp_path / "x", stat.S_IRWXU)
    with pytest.raises(UserError, match=r"x cannot be run \(Exec format error\)"):
        command(str(tmp_path / "x"), "{output}").fetch("x", asked(), tmp_path / "a.mp4")


def test_the_identity_is_the_command_its_version_and_the_rules() -> None:
    identity = command("sh", "{output}", version="2", short="loop", timeout_s=9).identity
    assert identity.version == "2"
    assert identity.settings == {"argv": ["sh", "{output}"], "fit": "crop", "short": "loop", "start": "begin"}
