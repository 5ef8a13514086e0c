"""Progress bars with rate and ETA: alive on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # between lines where nobody watches


def progress_bar(total: int, unit: str, description: str, **options: Any) -> tqdm:
    """A tqdm bar on stderr; `options` are tqdm's (initial, disable, smoothing)."""
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        unit=unit,
        desc=description,
        mininterval=0.1 if watched else LOG_SECONDS,
        maxinterval=10.0 if watched else LOG_SECONDS,
        ascii=None if watched else True,
        dynamic_ncols=watched,
        **options,
    )
