"""The built wheel is complete: it works from any folder, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # pip builds and unpacks a wheel: 10 s on two busy cores
PARTS = ("afd_data", "afd_train", "cli", "recipes", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its traces beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_every_module_recipe_prompt_and_base(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    renamed = {"cli": "afd_cli", "recipes": "afd_recipes"}
    for part in ("afd_data", "afd_train", "cli", "recipes"):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                inner = path.relative_to(ROOT / part).as_posix()
                assert f"{renamed.get(part, part)}/{inner}" in names
    assert {name.split("/")[0] for name in names} >= {"afd_cli", "afd_data", "afd_recipes", "afd_train"}
    assert "cli" not in {name.split("/")[0] for name in names}


def test_the_quickstart_is_planned_from_the_installed_wheel_alone(wheel, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "afd_cli", "run", "quickstart", "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"source: {site}/afd_recipes/prompts/" in result.stdout
