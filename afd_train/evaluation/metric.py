"""What every metric table of the evaluation holds: which way is better, the unit, and a definition for the report.

`motion.METRICS`, `quality.METRICS` and `physics.METRICS` map a metric's name to one of these.  A function `measure`
beside the table returns the values by the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number a video.  `definition` is one or two plain sentences: the report prints it for the reader.

    Units that begin with `share` are printed as per cent; `share of videos` marks a yes or no, 1.0 or 0.0 a video.
    """

    better: Literal["higher", "lower"]
    unit: str
    definition: str
