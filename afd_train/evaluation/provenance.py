"""Where the numbers of a report come from: recipe, code, checkpoints, seeds, machine.  Nothing here is secret."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from afd_train.config import Recipe

PACKAGES = ("torch", "diffusers", "numpy", "opencv-python-headless", "scipy", "av")


def header(recipe: Recipe, checkpoints: Mapping[str, str], step: int, cells: str, teacher: str) -> dict[str, Any]:
    """Name -> JSON value, in the order of printing.

    checkpoints: policy -> sha256 of its folder; cells: "64 x 4"; teacher: sha256 of its videos.
    """
    video = recipe.video
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe sha256": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        "out": recipe.out,
        "git commit": git_commit() or "not run from a git checkout",
        **{f"checkpoint {policy}": digest for policy, digest in checkpoints.items()},
        "training step": step,
        "teacher": recipe.teacher.name,
        "teacher's videos": teacher,
        "split": recipe.eval.split,
        "prompts x clips": cells,
        "seeds": f"recipe {recipe.seed}, evaluation {recipe.eval.seed}",
        "noise seed": recipe.eval.seed,
        "sampler": f"steps {list(recipe.student.steps)} of 1000, shift {recipe.student.shift:g}",
        "video": f"{video.width} x {video.height}, {video.frames} frames, {video.fps:g} fps",
        "statistics": f"unit = prompt; {recipe.eval.resamples} resamples; BCa bootstrap, sign-flip test, Holm",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def git_commit() -> str | None:
    """Commit of the checkout that this file is tracked in, with "(changed)" where files differ; None elsewhere."""
    folder = Path(__file__).parent
    try:
        # An installed copy may lie inside somebody else's repository: only a tracked file is evidence.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + (" (changed)" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # for example OpenCV from another distribution
        return "(other distribution)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
