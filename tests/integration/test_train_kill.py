"""Training under kill -9: the same command again ends in the same bits."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from afd_train.config import Recipe, TrainConfig
from afd_train.objective_config import AfdConfig, FlowMatchingConfig
from afd_train.runs import train_folder

BOOKS: dict[str, Any] = {
    "prompts_per_step": 2,
    "rollouts_per_prompt": 2,
    "validate_every_steps": 20,
    "validation_prompts": 2,
}
PRETRAIN = (TrainConfig(objective=FlowMatchingConfig(), steps=12, save_every_steps=3, **BOOKS),)
TRAIN = TrainConfig(objective=AfdConfig(), steps=40, save_every_steps=4, held_out_per_step=1, **BOOKS)
KILLS = 5
RUN = """
import sys, yaml
from afd_train.recipe import load_recipe
from afd_train.trainer import train
train(load_recipe(sys.argv[1]))
"""


def start(recipe: Recipe, folder: Path) -> subprocess.Popen:
    """`train` in a process group of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def lines(out: Path) -> int:
    """Steps in the logs of both phases."""
    logs = [out / "train" / phase / "metrics.jsonl" for phase in ("pretrain-0", ".")]
    return sum(path.read_bytes().count(b"\n") for path in logs if path.exists())


def killed_in(process: subprocess.Popen, folder: Path, steps: int, pause_s: float) -> bool:
    """kill -9 after so many more logged steps and a pause; False if the run ended before."""
    goal = lines(folder) + steps
    while lines(folder) < goal and process.poll() is None:
        time.sleep(0.005)
    time.sleep(pause_s)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def files(folder: Path) -> dict[str, bytes]:
    """Everything but clocks and TensorBoard's time-stamped files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != ".lock" and "tensorboard" not in name and not name.endswith("timings.jsonl"):
            found[name] = re.sub(rb'"seconds": [0-9.e-]+', b'"seconds": 0', path.read_bytes())
    return found


@pytest.mark.slow  # seven processes import torch and diffusers
def test_five_kills_at_random_moments_change_no_bit(tiny_recipe, tmp_path):
    unbroken, broken = (tiny_recipe(tmp_path / name, pretrain=PRETRAIN, train=TRAIN) for name in ("one", "five"))
    for recipe in (unbroken, broken):
        Path(recipe.out).mkdir()
    finish(start(unbroken, tmp_path / "one"))
    moments, kills = random.Random(0), 0
    for _ in range(KILLS):
        process = start(broken, tmp_path / "five")
        kills += killed_in(process, tmp_path / "five", moments.randint(1, 9), moments.uniform(0, 0.05))
    finish(start(broken, tmp_path / "five"))
    assert kills == KILLS
    assert files(train_folder(broken)) == files(train_folder(unbroken))
