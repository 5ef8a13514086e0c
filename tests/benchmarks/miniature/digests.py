"""What videos and numbers depend on, as one hash: settings, prompts and starting weights; neither folders nor seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from afd_train.config import Recipe
from afd_train.evaluation.clips import folder_sha256
from afd_train.shipped import shipped_student

VIDEOS = frozenset({"video", "prompts", "teacher", "cache"})  # sections that a cache follows from
DRAWN = VIDEOS | {"student", "eval"}  # and numbers of a student that nothing has trained
TRAINED = DRAWN | {"discriminator", "pretrain", "train"}


def digest_of(recipe: Recipe, sections: Set[str]) -> str:
    """64 hex digits.  Files count by their content, whatever they are called.

    What is off (null, false, 0 or empty) does not count, so that an option that a later version adds changes nothing.
    """
    settings = recipe.model_dump(mode="json", include=set(sections))
    settings["cache"].pop("folder")
    for key in ("source", "test_source"):
        path = settings["prompts"][key]
        if path and Path(path).is_file():
            settings["prompts"][key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    init = recipe.student.init
    folder = init and (shipped_student(init) or Path(init))
    if "student" in sections and folder and folder.is_dir():
        settings["student"]["init"] = folder_sha256(folder)
    return hashlib.sha256(json.dumps(_on(settings), sort_keys=True).encode()).hexdigest()


def _on(settings: Any) -> Any:
    """Without what is off, at any depth of sections."""
    if not isinstance(settings, dict):
        return settings
    return {key: on for key, value in settings.items() if (on := _on(value))}
