"""The book of uses of the test prompts: settings are chosen on validation prompts, and tested once.

A use is written down before anything is measured.  The same settings may be used again (to resume, or for more seeds);
other settings of a method that was measured on the test prompts may not, unless a reason is given, which is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afd_data.errors import UserError

DEFAULT = Path(__file__).resolve().parents[3] / "recipes" / "miniature" / "test_uses.jsonl"
CHANGED = " (changed)"  # how git_commit marks a dirty tree


def check(path: Path, world: str, methods: Mapping[str, str], reason: str | None) -> None:
    """Raise UserError where one of `methods` (name -> digest) was tested with other settings, unless for a reason."""
    uses = [] if reason else read(path)
    for name, digest in methods.items():
        before = [use for use in uses if use["world"] == world and name in use["methods"]]
        if before and all(use["methods"][name] != digest for use in before):
            raise UserError(
                f"{name} in {world} was measured on the test prompts on {before[-1]['date']} with other settings. "
                "Choose settings with --split validation. If this is no choice of settings, say why: "
                f'--use-test-again "REASON" (kept in {path.name}).'
            )


def record(path: Path, world: str, methods: Mapping[str, str], reason: str | None, commit: str) -> None:
    """Write a use down.  commit: as `git_commit` says, of before this book was written in."""
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.removesuffix(CHANGED),
        "dirty": commit.endswith(CHANGED),
        "world": world,
        "methods": dict(methods),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | ({"reason": reason} if reason else {})) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All uses, oldest first.  Raises UserError for a damaged book."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}); bring back the version of the last commit") from None
