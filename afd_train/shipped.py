"""What comes with afd, by name: recipes (`quickstart`) and students (`miniature/one-step`).  Torch-free."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

_STUDENT = re.compile(r"[a-z0-9-]+/[a-z0-9-]+")


def shipped_folder() -> Path:
    """Recipes, prompts and students."""
    # The distribution is always unpacked (package data holds checkpoints), so this is an ordinary folder.
    return Path(str(resources.files("afd_recipes")))


def shipped_recipes() -> list[str]:
    """Names of the recipes: `NAME`, or `GROUP/NAME` for recipes/GROUP/NAME.yaml."""
    folder = shipped_folder()
    found = (*folder.glob("*.yaml"), *folder.glob("*/*.yaml"))
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def shipped_student(name: str) -> Path | None:
    """Folder of a student: `GROUP/NAME` is recipes/GROUP/bases/NAME; None: no such student."""
    if not _STUDENT.fullmatch(name):
        return None
    group, own = name.split("/")
    folder = shipped_folder() / group / "bases" / own
    return folder if (folder / "student.json").is_file() else None
