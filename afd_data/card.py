"""The dataset card of a cache: `README.md` with declared splits and features, so that stock readers need not guess."""

from __future__ import annotations

from pathlib import Path

from afd_data.teachers import Identity


def write_card(folder: Path, identity: Identity) -> None:
    """Write README.md of the cache."""
