"""The life of a sample: its states, and the only steps between them.

planned -> intent (about to be asked) -> submitted (the teacher gave a job id) -> running -> ready (can be fetched)
-> spooled (durable here, accepted) -> sealed (in a shard).  `failed` may be asked again; refused, rejected and unknown
are ends.
"""

from __future__ import annotations

TRANSITIONS: dict[str, frozenset[str]] = {
    "planned": frozenset({"intent"}),
    "intent": frozenset({"submitted", "refused", "failed", "unknown", "planned"}),
    "submitted": frozenset({"running", "ready", "refused", "failed", "planned"}),
    "running": frozenset({"ready", "refused", "failed", "planned"}),
    "ready": frozenset({"spooled", "rejected", "refused", "failed", "planned"}),
    "spooled": frozenset({"sealed", "rejected", "planned"}),
    "failed": frozenset({"planned"}),
    "sealed": frozenset(),
    "refused": frozenset(),
    "rejected": frozenset(),
    "unknown": frozenset(),  # only a person may decide what became of it
}
IN_FLIGHT = ("intent", "submitted", "running", "ready")
OPEN = ("planned", *IN_FLIGHT)  # what comes of the sample is not yet known


def check_transition(old: str, new: str) -> None:
    """Assert that a sample in state `old` may enter `new`: an illegal step is a bug of ours."""
    assert new in TRANSITIONS[old], f"illegal transition {old} -> {new}"
