"""Two processes train as one does, with whole or sharded weights, and go on exactly after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from afd_data.errors import UserError
from afd_train.recipe import load_recipe
from afd_train.runlog import read_metrics
from afd_train.students.folder import open_student
from afd_train.trainer import train

TRAIN: dict[str, Any] = {
    "steps": 4, "prompts_per_step": 4, "rollouts_per_prompt": 3, "learning_rate": 2e-4, "warmup_steps": 2,
    "save_every_steps": 1, "keep_checkpoints": 9, "validate_every_steps": 2, "validation_prompts": 3,
    "held_out_per_step": 2,
}  # fmt: skip
HARDEST = {"hardest": 0.5}  # of adversarial objectives
STUDENT = {"dim": 24, "heads": 2, "layers": 2, "ffn_dim": 32, "text_tokens": 6, "text_dim": 16}
LORA = ["train.policy.name=lora", "train.policy.rank=4", "train.policy.alpha=4"]
PARTS = ["train.chunk_by_chunk=true", "train.gradient_checkpointing=true", "train.clips_per_pass=2"]
VARIANTS = {
    "ddp": ["train.shard=never"],
    "fsdp": ["train.shard=always"],
    "ddp-lora": ["train.shard=never", *LORA],
    "fsdp-lora": ["train.shard=always", *LORA, *PARTS],
    "fsdp-bfloat16": ["train.shard=always", "student.dtype=bfloat16"],
    "fsdp-lora-bfloat16": ["train.shard=always", *LORA, *PARTS, "student.dtype=bfloat16"],
}
MANY = """
import json, sys
from afd_train.recipe import load_recipe
from afd_train.trainer import train
for sets in json.loads(sys.argv[2]):
    train(load_recipe(sys.argv[1], sets))
"""


@pytest.fixture(scope="module")
def recipe_file(playground_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 4 steps with AFD on the small cache; flow matching goes before, so that phases follow each other."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = {
        "out": str(folder / "one"),
        "video": {"width": 16, "height": 16, "frames": 4, "fps": 8.0, "lossless": True},
        "prompts": {"source": "unused.txt", "validation": 4},
        "teacher": {"name": "playground"},
        "stream": {"folder": str(playground_cache)},
        "student": STUDENT,
        "discriminator": {
            "dim": 16,
            "heads": 2,
            "layers": 1,
            "warmup_steps": 2,
            "warmup_prompts": 4,
            "warmup_learning_rate": 2e-4,
            "warmup_patience": 5,
            "band": {"low": 0.5, "high": 1.0},
        },
        "pretrain": [TRAIN | {"objective": {"name": "flow-matching"}, "steps": 2}],
        "train": TRAIN | HARDEST,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def sets_of(recipe_file: Path, name: str) -> list[str]:
    return [f"out={recipe_file.parent / name}", *VARIANTS[name.removeprefix("one-")]]


def launched(*arguments: str, **options: Any) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", *arguments]  # fmt: skip
    return subprocess.Popen(command, env=environment, start_new_session=True, **options)


@pytest.fixture(scope="module")
def runs(recipe_file: Path) -> Path:
    """All variants on two processes, one launch for all, and the same with one process."""
    script = recipe_file.with_name("many.py")
    script.write_text(MANY)
    train(load_recipe(recipe_file, [f"out={recipe_file.parent / 'begun'}", "train.steps=2", "train.shard=never"]))
    sets = [sets_of(recipe_file, name) for name in VARIANTS]
    sets.append([f"out={recipe_file.parent / 'begun'}", "train.shard=never"])
    process = launched(
        str(script), str(recipe_file), json.dumps(sets),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for name in ("ddp", "ddp-lora", "fsdp-bfloat16"):  # sharding changes nothing where there is nobody to share with
        train(load_recipe(recipe_file, sets_of(recipe_file, f"one-{name}")))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return recipe_file.parent


def metrics(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "train" / "pretrain-0" / "metrics.jsonl") + read_metrics(run / "train" / "metrics.jsonl")


def losses(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.endswith("/loss")}


@pytest.mark.slow  # two processes import torch and train five small students
@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp-lora", "fsdp-lora"])
def test_two_processes_log_what_one_does(runs, name):
    alone, together = metrics(runs / f"one-{name.replace('fsdp', 'ddp')}"), metrics(runs / name)
    assert len(together) == 2 + 2 + 4  # flow matching, warm-up, AFD
    for one, two in zip(alone, together, strict=True):
        assert losses(one) == pytest.approx(losses(two), rel=0, abs=1e-5)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


@pytest.mark.slow  # as above
def test_two_processes_go_on_with_what_one_has_begun(runs):
    alone, together = metrics(runs / "one-ddp"), metrics(runs / "begun")
    assert [losses(row) for row in together] == [pytest.approx(losses(row), rel=0, abs=1e-5) for row in alone]


@pytest.mark.slow  # as above
def test_a_run_with_whole_weights_is_not_gone_on_with_sharded_ones(runs, recipe_file, tmp_path):
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    with pytest.raises(UserError, match=r"another recipe \(.*train\.shard differ\)"):
        train(
            load_recipe(
                recipe_file,
                [
                    f"out={tmp_path / 'run'}",
                    "pretrain=[]",
                    f"student.init={runs / 'fsdp/train/pretrain-0/students/ema'}",
                ],
            )
        )


@pytest.mark.slow  # as above
def test_in_bfloat16_they_agree_to_its_rounding(runs):
    alone, together = metrics(runs / "one-fsdp-bfloat16"), metrics(runs / "fsdp-bfloat16")
    for one, two in zip(alone, together, strict=True):
        assert one["student/loss"] == pytest.approx(two["student/loss"], rel=1e-2) if "student/loss" in one else True


@pytest.mark.slow  # as above
@pytest.mark.parametrize("name", ["fsdp", "fsdp-lora"])
def test_students_of_sharded_runs_open_as_any_other(runs, name):
    alone = open_student(runs / f"one-{name.replace('fsdp', 'ddp')}" / "train" / "students" / "ema").net
    together = open_student(runs / name / "train" / "students" / "ema").net
    for one, two in zip(alone.parameters(), together.parameters(), strict=True):
        assert (one - two).abs().max() < 1e-4  # Adam divides by the size of the gradient, so that rounding shows


@pytest.mark.slow  # as above
def test_a_sharded_checkpoint_holds_no_pickle(runs):
    files = [
        path.name for path in (runs / "fsdp" / "train" / "checkpoints" / "step-000004").rglob("*") if path.is_file()
    ]
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}


def traces(run: Path) -> dict[str, object]:
    """What must not depend on where a run was interrupted: students, checkpoints, logs."""
    train_folder = run / "train"
    found: dict[str, object] = {"metrics": (train_folder / "metrics.jsonl").read_bytes()}
    for path in [*train_folder.glob("students/**/*.safetensors"), *train_folder.glob("checkpoints/**/*.safetensors")]:
        # By tensor: torch.distributed.checkpoint puts them into a process's file in any order.
        tensors = {name: value.flatten().view(torch.uint8).tolist() for name, value in load_file(path).items()}
        found[str(path.relative_to(train_folder))] = tensors
    return found


@pytest.mark.slow  # two processes start twice
@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp-lora-bfloat16"])
def test_a_killed_run_of_two_processes_goes_on_exactly(runs, recipe_file, tmp_path, name):
    sets = [f"out={tmp_path / 'run'}", *VARIANTS[name]]
    command = ["-m", "afd_cli", "train", str(recipe_file), *(word for text in sets for word in ("--set", text))]
    process = launched(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/train/checkpoints/step-000001/state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # The launcher's children are sessions of their own.
    subprocess.run(["pkill", "-9", "-f", re.escape(str(tmp_path / "run"))], check=False)
    time.sleep(0.2)
    assert not (tmp_path / "run/train/checkpoints/step-000004").exists()
    again = launched(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert traces(tmp_path / "run") == traces(runs / name)
