"""What a user can get wrong, in one table: each case ends in its message and exit code 2, never in a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from afd_data.config import VideoConfig
from afd_data.video import write_mp4

RECIPE = """\
out: runs/a
video: {width: 16, height: 16, frames: 4, fps: 8}
prompts: {source: prompts.txt, validation: 1, test: 1}
teacher: {name: playground}
student: {dim: 24, heads: 2, layers: 1, ffn_dim: 32}
train:
  objective: {name: flow-matching}
  steps: 2
  prompts_per_step: 2
  trackers: []
"""
FOLDER = """\
out: runs/f
prompts: {source: teacher}
video: {width: 16, height: 16, frames: 4, fps: 8}
teacher: {name: folder, path: clips}
"""
PROMPTS = """\
a small red ball falls and bounces
a large blue ball rolls to the left
a green box slides to the right on the floor
two yellow balls fly apart in low gravity
"""
CAPTIONS = "file,caption\none.mp4,a bright gradient moves\ntwo.mp4,something else moves down\n"


@dataclass(frozen=True)
class Case:
    """`damage` spoils a folder in which everything is right; then `afd COMMAND` must say `message`."""

    name: str
    damage: Callable[[Path], object]
    command: str
    message: str


def nothing(_: Path) -> None:
    """The command line itself is the mistake."""


def file(name: str, text: str | bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def recipe(text: str | bytes) -> Callable[[Path], object]:
    return file("b.yaml", text)


def extended(text: str) -> Callable[[Path], object]:
    return file("b.yaml", f"extends: a\n{text}")


def without(pattern: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for path in found(folder, pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def flipped(pattern: str, at: float = 0.5) -> Callable[[Path], object]:
    def flip(folder: Path) -> None:
        path = found(folder, pattern)[0]
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= 0x40
        path.write_bytes(data)

    return flip


def cut(pattern: str, share: float = 0.5) -> Callable[[Path], object]:
    def truncate(folder: Path) -> None:
        path = found(folder, pattern)[0]
        os.truncate(path, int(share * path.stat().st_size))

    return truncate


def overwritten(pattern: str, text: str) -> Callable[[Path], object]:
    return lambda folder: found(folder, pattern)[0].write_text(text)


def edited(pattern: str, **values: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = found(folder, pattern)[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def one_clip(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """The folder teacher has a single video, and its bytes are `content(those of a good one)`."""

    def replace(folder: Path) -> None:
        good = (folder / "clips" / "one.mp4").read_bytes()
        shutil.rmtree(folder / "clips")
        file("clips/one.mp4", content(good))(folder)
        file("clips/one.txt", "a bright gradient moves")(folder)
        file("f.yaml", FOLDER)(folder)

    return replace


def member_added(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> Callable[[Path], object]:
    """A member at the end of a shard, of a cache without index; `size` is what its header claims."""

    def add(folder: Path) -> None:
        path = found(folder, "runs/a/cache/data/train/*.tar")[0]
        with tarfile.open(path, "a") as tar:
            header = tarfile.TarInfo(name)
            header.type, header.linkname, header.size = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "", size
            tar.addfile(header, io.BytesIO(bytes(min(size, 512))) if size <= 512 else None)
        without("runs/a/cache/index")(folder)

    return add


def both(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


def found(folder: Path, pattern: str) -> list[Path]:
    paths = sorted(folder.glob(pattern))
    assert paths, f"the test expects {pattern}"
    return paths


CACHE, TRAIN = "runs/a/cache", "runs/a/train"
ELSEWHERE = f"--set out=runs/b --set stream.folder={CACHE}"

# What a tar from a stranger may hold, and the commands that read one.
HOSTILE = (
    ("pickle", "p0-00.pyd", tarfile.REGTYPE, 0, "'p0-00.pyd' is not KEY.mp4 or KEY.json"),
    ("way out", "../p0-00.mp4", tarfile.REGTYPE, 0, "'../p0-00.mp4' is not KEY.mp4"),
    ("absolute name", "/tmp/p0-00.mp4", tarfile.REGTYPE, 0, "p0-00.mp4' is not KEY.mp4"),
    ("symlink", "p0-00.mp4", tarfile.SYMTYPE, 0, "'p0-00.mp4' is not a plain file"),
    ("hard link", "p0-00.mp4", tarfile.LNKTYPE, 0, "'p0-00.mp4' is not a plain file"),
    ("device", "p0-00.mp4", tarfile.BLKTYPE, 0, "'p0-00.mp4' is not a plain file"),
    ("pipe", "p0-00.json", tarfile.FIFOTYPE, 0, "'p0-00.json' is not a plain file"),
    ("bomb", "p0-00.json", tarfile.REGTYPE, 2**32, "p0-00.json claims 4294967296 bytes"),
)
READERS = (f"train a {ELSEWHERE}", f"cache inspect {CACHE}", f"cache verify {CACHE}", f"cache merge {CACHE} -o both")
UNSET = "AFD_NOT_SET"
ARK = f"teacher={{name: ark, model: m, key_variable: {UNSET}}}"
WRONG_VALUES = (
    ("cache-teacher a --partition 3/2", "--partition 3/2: expected INDEX/COUNT with 0 <= INDEX < COUNT"),
    ("cache-teacher a --partition 2", "--partition 2: expected INDEX/COUNT"),
    ("cache-teacher a --partition 0/2 --push-to-hub a/b", "--watch and --push-to-hub work on the merged cache"),
    ("cache-teacher a --max-cost -1", "'--max-cost'"),
    ("cache-teacher a --max-cost nan", "--max-cost nan"),
    ("cache-teacher a --watch 'every day'", "--watch: 'every day' is not a cron expression"),
    ("cache-teacher a --watch '0 0 31 2 *'", "--watch: '0 0 31 2 *' is not a cron expression"),
    ("cache-teacher a --watch", "set refresh.schedule"),
    ("cache-teacher a --set refresh.schedule=daily", "'daily' is not a cron expression"),
    (f"cache-teacher a --set '{ARK}'", f"the environment variable {UNSET} is not set"),
    ("cache-teacher a --set 'teacher={name: ark}'", "teacher.model: missing (model or endpoint id)"),
    (
        "cache-teacher a --set 'teacher={name: videos, base_url: localhost, model: m}'",
        "teacher.base_url: 'localhost' is not an http:// or https:// address",
    ),
    (
        "cache-teacher a --set 'teacher={name: videos, base_url: \"http://me:pw@host/v1\"}'",
        "teacher.base_url: no login, no ? and no # in it",
    ),
    ("cache-teacher a --set cache.max_cost=-1", "cache.max_cost: expected a number >= 0, got -1"),
    ("cache-teacher a --set cache.workers=0", "cache.workers: expected a number >= 1, <= 256, got 0"),
    (f"cache resubmit {CACHE}", "name samples, or use --absent or --state"),
    (f"cache resubmit {CACHE} p0-00", "no sample that ended without a video is called p0-00"),
    ("cache resubmit clips --absent", "clips: no journal.sqlite in it"),
    (f"cache resubmit {CACHE} --state sealed", "'--state'"),
    ("cache reconcile a --grace-minutes -5", "'--grace-minutes'"),
    ("cache reconcile a --set out=runs/z", "runs/z/cache: no journal.sqlite in it"),
)

CASES = [
    # Recipes
    Case("no such recipe", nothing, "run folderr", "recipe 'folderr': no such file. Did you mean folder?"),
    Case("a folder for a recipe", nothing, "run clips", "recipe 'clips': that is a folder"),
    Case("empty recipe", recipe(""), "train b", "b.yaml:1: a recipe is a mapping (lines of `key: value`); it is empty"),
    Case("a list for a recipe", recipe("- out"), "train b", "b.yaml:1: a recipe is a mapping"),
    Case("tab", recipe("train:\n\tsteps: 3\n"), "train b", "b.yaml:2: not YAML: a tab stands where YAML wants spaces"),
    Case(
        "not UTF-8", recipe("out: a\nseed: \xe9".encode("latin-1")), "train b", "b.yaml:2: not UTF-8 text (byte 0xe9)"
    ),
    Case("two documents", recipe("out: a\n---\nout: b\n"), "train b", "more than one document"),
    Case("alias", recipe("out: &a x\nprompts: *a\n"), "train b", "b.yaml:2: not YAML: aliases (*name) are not read"),
    Case("python object", recipe("out: !!python/name:os.system x\n"), "train b", "b.yaml:1: out: the tag tag:yaml.org"),
    Case("key given twice", extended("seed: 1\nseed: 2\n"), "train b", "b.yaml:3: seed: given twice, first in line 2"),
    Case(
        "unknown key",
        extended("train:\n  learnig_rate: 1e-4\n"),
        "train b",
        "b.yaml:3: train.learnig_rate: unknown key. Did you mean learning_rate? Allowed here: objective, policy,",
    ),
    Case(
        "key of another section",
        extended("fps: 8\n"),
        "train b",
        "b.yaml:2: fps: unknown key. Did you mean video.fps? Allowed here: ",
    ),
    Case(
        "text for a number",
        extended("train: {steps: many}\n"),
        "train b",
        'b.yaml:2: train.steps: expected a whole number >= 1, got "many"',
    ),
    Case(
        "number out of range",
        extended("video:\n  width: 7\n"),
        "train b",
        "b.yaml:3: video.width: expected a number >= 8, <= 4096, a multiple of 2, got 7",
    ),
    Case(
        "infinite number",
        extended("train: {learning_rate: .inf}\n"),
        "train b",
        "b.yaml:2: train.learning_rate: expected a finite number > 0, got Infinity",
    ),
    Case(
        "unknown teacher",
        extended("teacher: {name: playgruond}\n"),
        "train b",
        'b.yaml:2: teacher.name: got "playgruond". Allowed: playground, folder, local, command, hub, ark, videos, '
        "fal, runway. Did you mean playground?",
    ),
    Case(
        "unknown word of a list",
        extended("eval: {policies: [base, emma]}\n"),
        "eval b",
        'b.yaml:2: eval.policies.1: got "emma". Allowed: base, student, ema. Did you mean ema?',
    ),
    Case(
        "frames that do not fill chunks",
        extended("video: {frames: 5}\n"),
        "train b",
        "b.yaml:2: video.frames: 5 is not divisible by student.chunk_frames 2",
    ),
    Case(
        "one rollout a prompt",
        extended("train: {objective: {name: afd}, rollouts_per_prompt: 1}\n"),
        "train b",
        "b.yaml:2: train.rollouts_per_prompt: afd compares rollouts of one prompt and needs at least 2",
    ),
    Case(
        "circle of parents", file("a.yaml", "extends: a\n"), "train a", "extends: goes round in a circle: a.yaml -> a"
    ),
    Case("parent that is not there", recipe("extends: z\n"), "train b", "b.yaml:1: extends 'z': no such file"),
    Case("nothing set", nothing, "train a --set train.steps", "--set train.steps: expected KEY.PATH=VALUE"),
    Case(
        "no such list entry",
        nothing,
        "train a --set pretrain=[{}] --set pretrain.1.steps=1",
        "--set: pretrain.1: no such entry of the list. Allowed: 0 to 0",
    ),
    Case(
        "folder without a path", nothing, "cache-teacher folder", "teacher.path: missing (folder that holds the videos)"
    ),
    # Prompts
    Case("no such prompts", nothing, "run a --set prompts.source=promts.txt", "Did you mean 'prompts.txt'?"),
    Case(
        "playground without prompts",
        nothing,
        "cache-teacher a --set prompts.source=teacher",
        "--set: prompts.source: playground has no prompts of its own",
    ),
    Case(
        "prompts of an unknown kind",
        file("p.doc", PROMPTS),
        "cache-teacher a --set prompts.source=p.doc",
        "unknown kind of file; use .txt, .csv, .jsonl, .parquet",
    ),
    Case(
        "no such column",
        file("p.csv", "text,promt\n1,a red ball falls\n"),
        "cache-teacher a --set prompts.source=p.csv",
        "p.csv:1: no column 'prompt'. Did you mean 'promt'?",
    ),
    Case(
        "broken JSON line",
        file("p.jsonl", '{"prompt": "a red ball"}\n{"prompt": \n'),
        "cache-teacher a --set prompts.source=p.jsonl",
        "p.jsonl:2: not JSON",
    ),
    Case(
        "a number for a prompt",
        file("p.jsonl", '{"prompt": 3}\n'),
        "cache-teacher a --set prompts.source=p.jsonl",
        "p.jsonl:1: prompt is int, expected text",
    ),
    Case(
        "broken parquet",
        file("p.parquet", "PAR1"),
        "cache-teacher a --set prompts.source=p.parquet",
        "p.parquet: not a parquet file",
    ),
    Case("prompts not UTF-8", file("prompts.txt", b"a r\xe9d ball\n"), "cache-teacher a", "prompts.txt: not UTF-8"),
    Case("no prompts", file("prompts.txt", "\n# nothing\n"), "cache-teacher a", "holds no prompts"),
    Case("too few prompts", nothing, "run a --set prompts.test=9", "are too few"),
    Case(
        "evaluation prompts in training",
        file("p.txt", PROMPTS),
        "cache-teacher a --set prompts.test_source=p.txt --set prompts.test=0",
        "evaluation prompts occur in training",
    ),
    # Videos and captions
    Case("no such folder", nothing, "cache-teacher f --set teacher.path=clps", "teacher.path: no folder clps"),
    Case("no videos", file("d/x.txt", "x"), "cache-teacher f --set teacher.path=d", "teacher.path: no videos in d"),
    Case("no captions", without("clips/captions.csv"), "cache-teacher f", "clips: no captions. Write captions.csv"),
    Case(
        "caption of no video",
        file("clips/captions.csv", CAPTIONS + "three.mp4,x\n"),
        "cache-teacher f",
        "captions.csv:4: column 'file': 'three.mp4' is not in clips",
    ),
    Case(
        "caption outside the folder",
        file("clips/captions.csv", CAPTIONS + "../a.mp4,x\n"),
        "cache-teacher f",
        "'../a.mp4' leads out of the folder",
    ),
    Case(
        "video with two captions",
        file("clips/captions.csv", CAPTIONS + "one.mp4,x\n"),
        "cache-teacher f",
        "'one.mp4' stands there 2 times",
    ),
    Case(
        "empty caption",
        file("clips/captions.csv", "file,caption\none.mp4,\n"),
        "cache-teacher f",
        "the prompt is empty",
    ),
    Case("truncated video", one_clip(lambda good: good[: len(good) // 2]), "cache-teacher f", "no video was taken"),
    Case("page for a video", one_clip(lambda _: b"<!DOCTYPE html><p>no"), "cache-teacher f", "HTML"),
    Case("empty video", one_clip(lambda _: b""), "cache-teacher f", "no video was taken"),
    # Caches and shards
    Case("status of no cache", nothing, "cache status clips", "clips: no journal.sqlite in it"),
    Case("inspection of no cache", nothing, "cache inspect clips", "clips: no manifest.json with samples in it"),
    Case(
        "damaged journal", file(f"{CACHE}/journal.sqlite", "x" * 4096), f"cache status {CACHE}", "not a journal of afd"
    ),
    Case("flipped byte", flipped(f"{CACHE}/data/train/*.tar"), f"cache verify {CACHE}", "problems in runs/a/cache"),
    Case("lost shard", without(f"{CACHE}/data/train/*.tar"), f"cache verify {CACHE}", "train/g0000-000000.tar"),
    Case("manifest that is none", file(f"{CACHE}/manifest.json", "{}"), f"train a {ELSEWHERE}", "manifest.json: not a"),
    Case(
        "manifest of another version",
        edited(f"{CACHE}/manifest.json", version=99),
        f"train a {ELSEWHERE}",
        "manifest version 99",
    ),
    Case(
        "other seed", nothing, "cache-teacher a --set seed=5", "runs/a/cache was made with other settings: seed was 0"
    ),
    Case(
        "no cache to train on", nothing, "train a --set out=runs/b", "runs/b/cache: no train samples. Run `afd cache-"
    ),
    Case(
        "truncated shard",
        cut(f"{CACHE}/data/train/*.tar", share=0.25),  # up to half of a small tar is padding
        f"train a {ELSEWHERE}",
        "g0000-000000.tar",
    ),
    Case(
        "video that is not what was sealed",
        flipped(f"{CACHE}/data/train/*.tar", at=0.1),
        f"train a {ELSEWHERE}",
        "is not what was sealed",
    ),
    Case(
        "clips of another size",
        nothing,
        f"train a {ELSEWHERE} --set video.width=32",
        "of 16x16 at 8 fps, the recipe wants 4 of 32x16 at 8",
    ),
    Case(
        "pickle in a shard", member_added("p0-00.pyd"), f"train a {ELSEWHERE}", "'p0-00.pyd' is not KEY.mp4 or KEY.json"
    ),
    Case("way out of a shard", member_added("../p0-00.mp4"), f"train a {ELSEWHERE}", "'../p0-00.mp4' is not KEY.mp4"),
    *(
        Case(f"{name} that {command[:13].strip()} meets", member_added(member, kind, size), command, message)
        for name, member, kind, size, message in HOSTILE
        for command in READERS
    ),
    # Caching
    *(Case(f"wrong value {line}", nothing, line, message) for line, message in WRONG_VALUES),
    # Checkpoints and students
    Case(
        "damaged checkpoint",
        flipped(f"{TRAIN}/checkpoints/step-000002/student.safetensors", at=0.9),
        "train a --set train.steps=3",
        "student.safetensors: missing, or its sha256 is not the one in state.json",
    ),
    Case(
        "damaged state",
        overwritten(f"{TRAIN}/checkpoints/step-000002/state.json", "{"),
        "train a --set train.steps=3",
        "state.json: not a checkpoint's state",
    ),
    Case(
        "checkpoint of another version",
        edited(f"{TRAIN}/checkpoints/step-000002/state.json", format=99),
        "train a --set train.steps=3",
        "checkpoint format 99",
    ),
    Case(
        "checkpoint of another recipe",
        nothing,
        "train a --set train.learning_rate=0.5",
        "runs/a/train: holds a run of another recipe (train.learning_rate differ)",
    ),
    Case("fewer steps than done", nothing, "train a --set train.steps=1", "is at step 2, beyond train.steps=1"),
    Case("no student", nothing, "generate clips 'a ball'", "clips: no student here (student.json is missing)"),
    Case(
        "truncated weights",
        cut(f"{TRAIN}/students/ema/transformer/*.safetensors"),
        "generate a 'a ball'",
        "not a readable safetensors file",
    ),
    Case(
        "weights of another student",
        lambda folder: overwritten(f"{TRAIN}/students/ema/student.json", other_width(folder))(folder),
        "generate a 'a ball'",
        "ema: transformer/ has dim 24 (the recipe: 32)",
    ),
    Case("no mp4", nothing, "generate a 'a ball' -o ball.gif", "--output ball.gif: the name must end in .mp4"),
    Case(
        "no student to start from",
        nothing,
        "train a --set out=runs/b --set student.init=runs/z",
        "student.init: runs/z: there is no such file or folder",
    ),
    Case("nothing trained yet", without(TRAIN), "eval a", "runs/a/train/students/base"),
    Case(
        "no test videos", nothing, f"eval a --set stream.folder={CACHE} --set out=runs/b", "runs/b/train/students/base"
    ),
    Case(
        "unknown metric",
        nothing,
        "eval a --set eval.primary_metric=beauty",
        "eval.primary_metric: 'beauty' is not measured",
    ),
]


def other_width(folder: Path) -> str:
    """The description of the trained student, with another width."""
    about = json.loads(found(folder, f"{TRAIN}/students/ema/student.json")[0].read_text())
    return json.dumps(about | {"student": about["student"] | {"dim": 32}})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, afd: Callable[..., Result]) -> Path:
    """A folder in which everything is right: recipes, prompts, clips, a cache, a finished training."""
    folder = tmp_path_factory.mktemp("sound")
    for name, text in (
        ("a.yaml", RECIPE),
        ("f.yaml", FOLDER),
        ("prompts.txt", PROMPTS),
        ("clips/captions.csv", CAPTIONS),
    ):
        file(name, text)(folder)
    shape = VideoConfig(width=32, height=32, frames=8)
    gradient = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)
    for index, name in enumerate(("one", "two")):
        frames = np.stack([np.roll(gradient, 3 * frame, axis=index) * 4 for frame in range(8)])
        write_mp4(folder / "clips" / f"{name}.mp4", np.repeat(frames[..., None], 3, axis=-1), shape)
    with contextlib.chdir(folder):
        for command in (["cache-teacher", "a"], ["train", "a"]):
            result = afd(*command)
            assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_gets_its_message_and_exit_code_2(case, sound, afd, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(sound, folder)
    monkeypatch.chdir(folder)
    case.damage(folder)
    result = afd(*shlex.split(case.command))
    assert case.message in result.stderr
    assert result.exit_code == 2
    assert "Traceback" not in result.output
