"""Students small enough for a test: two layers of width 24 on four frames of 16 x 16 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from afd_data.config import VideoConfig
from afd_train.config import StudentConfig

if TYPE_CHECKING:
    from afd_train.students import Student

TINY: dict[str, Any] = {"dim": 24, "heads": 2, "layers": 2, "ffn_dim": 32, "text_tokens": 6, "text_dim": 16}


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
