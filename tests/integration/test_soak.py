"""Ten kills of the soak `tests.soak.paid_cache`, whose long version is a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.paid_cache import soak


@pytest.mark.slow  # some thirty runs of the stage
def test_a_paid_cache_survives_ten_kills_in_any_state(tmp_path: Path):
    seen = soak(kills=10, seed=7, folder=tmp_path, say=lambda text: None)
    assert sum(seen.values()) > 0
