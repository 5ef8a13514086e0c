"""Students small enough for a test: two layers of width 24 on four frames of 16 x 16 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from afd_data.config import VideoConfig
from afd_train.config import StudentConfig, TrainConfig

if TYPE_CHECKING:
    from afd_train.objectives import Setup
    from afd_train.students import Student

TINY: dict[str, Any] = {"dim": 24, "heads": 2, "layers": 2, "ffn_dim": 32, "text_tokens": 6, "text_dim": 16}
TAKES = 4  # rollouts of a prompt


@pytest.fixture
def tiny_student() -> Callable[..., Student]:
    """`tiny_student(frames=4, seed=0, prediction="clean", ...)` -> a student with random weights."""

    def make(frames: int = 4, seed: int = 0, **settings: Any) -> Student:
        from afd_train.students import new_student

        video = VideoConfig(width=16, height=16, frames=frames, fps=8.0, lossless=True)
        student = new_student(StudentConfig(**(TINY | settings)), video, seed)
        student.net.eval()
        return student

    return make


@pytest.fixture
def setup_of(tiny_recipe: Callable[..., Any], playground_cache: Path, tmp_path: Path) -> Callable[..., Setup]:
    """`setup_of(AfdConfig(), seed=0, frames=4, student={"steps": (1000,)}, clips_per_pass=3, ...)`.

    What an objective is given, on the small cache; further settings are those of `TrainConfig`.
    """

    def make(objective: Any, seed: int = 0, frames: int = 4, student: dict | None = None, **settings: Any) -> Setup:
        from afd_data.stream import Stream
        from afd_train.objective_config import policies_of
        from afd_train.objectives import Setup
        from afd_train.parallel import Processes, open_accelerator
        from afd_train.policies import Trainee
        from afd_train.runlog import Stopwatch
        from afd_train.students import new_student

        recipe = tiny_recipe(tmp_path, seed=seed, student=student)
        books: dict[str, Any] = {"rollouts_per_prompt": TAKES, "warmup_steps": 0}
        config = TrainConfig(objective=objective, **(books | settings))
        processes = Processes(open_accelerator(), config)
        made = new_student(recipe.student, recipe.video.model_copy(update={"frames": frames}), seed)
        return Setup(
            student=made,
            trainee=Trainee(made.net, config, processes, seed, policies_of(objective)),
            config=config,
            discriminator=recipe.discriminator,
            stream=Stream(playground_cache, recipe.stream, "train", seed),
            held_out=Stream(playground_cache, recipe.stream, "validation", seed),
            seed=seed,
            processes=processes,
            watch=Stopwatch(),
        )

    return make
