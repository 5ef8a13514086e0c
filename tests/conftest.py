"""What all tests share: the command `afd` in this process, and a small cache with recipes that train on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from afd_data.config import CacheConfig, PlaygroundConfig, PromptsConfig, StreamConfig, VideoConfig
from afd_train.config import Recipe, SpaceTimeConfig, StudentConfig
from tests.hub_server import HubServer, connect, serving
from tests.provider import Provider
from tests.provider import serving as serving_provider

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "orange", "white")
VIDEO = VideoConfig(width=16, height=16, frames=4, fps=8.0, lossless=True)
STUDENT: dict[str, Any] = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 32, "text_tokens": 6, "text_dim": 16}
DISCRIMINATOR: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 1, "warmup_steps": 2, "warmup_prompts": 4}


@pytest.fixture(scope="session")
def afd() -> Callable[..., Result]:
    """`afd("train", "my.yaml")` -> click's Result: exit_code, stdout, stderr, exception."""
    # `cli/` is called `afd_cli` once it is installed; type checkers cannot follow that.
    main = importlib.import_module("afd_cli").main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="afd")

    return run


@pytest.fixture(scope="session")
def playground_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real cache of the playground: 12 training and 4 validation prompts, one video of 4 frames of 16 x 16 each."""
    from afd_data.cache import cache_teacher
    from afd_data.prompts import load_prompts
    from afd_data.teachers import open_teacher

    folder = tmp_path_factory.mktemp("playground")
    texts = [f"A {colour} ball is {verb}." for colour in COLOURS for verb in ("dropped", "thrown to the right")]
    (folder / "prompts.txt").write_text("\n".join(texts))
    recipe = Recipe(
        out=str(folder),
        video=VIDEO,
        prompts=PromptsConfig(source=str(folder / "prompts.txt"), validation=4, near_duplicate=1.0),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(frozen=0.0, near_duplicate=-1),
    )
    teacher = open_teacher(recipe.teacher)
    prompts = load_prompts(recipe.prompts, folder, teacher)
    summary = cache_teacher(recipe, prompts, folder / "cache", teacher, progress=False)
    assert summary.sealed == len(texts)
    return folder / "cache"


@pytest.fixture(scope="session")
def tiny_recipe(playground_cache: Path) -> Callable[..., Recipe]:
    """`tiny_recipe(out, train=..., pretrain=..., student={...})` -> an experiment of seconds on that cache."""

    def make(
        out: Path, student: dict[str, Any] | None = None, discriminator: dict[str, Any] | None = None, **sections: Any
    ) -> Recipe:
        settings: dict[str, Any] = {
            "video": VIDEO,
            "prompts": PromptsConfig(source="unused.txt", validation=4),
            "stream": StreamConfig(folder=str(playground_cache)),
        }
        return Recipe(
            out=str(out),
            teacher=PlaygroundConfig(),
            student=StudentConfig(**(STUDENT | (student or {}))),
            discriminator=SpaceTimeConfig(**(DISCRIMINATOR | (discriminator or {}))),
            **(settings | sections),
        )

    return make


@pytest.fixture(scope="session")
def _served_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serving(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(_served_hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """An empty Hub on this machine that `huggingface_hub` talks to, logged in as `alice`."""
    _served_hub.clear()
    connect(_served_hub.url, tmp_path / "hf_home", monkeypatch)
    return _served_hub


@pytest.fixture(scope="session")
def _served_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with serving_provider(tmp_path_factory.mktemp("provider")) as provider:
        yield provider


@pytest.fixture
def provider(_served_provider: Provider) -> Provider:
    """Services that sell videos, in a process of their own; nothing was ordered yet."""
    _served_provider.reset()
    return _served_provider


@pytest.fixture(scope="session")
def student(tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder with random weights; not to be written to."""
    from afd_train.students import new_student
    from afd_train.students.folder import save_student

    folder = tmp_path_factory.mktemp("student")
    recipe = tiny_recipe(folder)
    save_student(new_student(recipe.student, recipe.video, seed=0), folder / "ema")
    return folder / "ema"
