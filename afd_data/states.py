"""The life of a sample: its states, and the only steps between them.

planned -> intent (about to be asked) -> submitted (the teacher gave a job id) -> running -> ready (can be fetched)
-> spooled (durable here, accepted) -> sealed (in a shard).  The other ends are `refused` (the teacher will not),
`failed` (it tried and failed), `rejected` (delivered and not taken) and `unknown` (it may have taken the order).
A free teacher is asked again for what failed; everything else that ended without a video is asked again only when a
person says so.
"""

from __future__ import annotations

TRANSITIONS: dict[str, frozenset[str]] = {
    "planned": frozenset({"intent"}),
    "intent": frozenset({"submitted", "refused", "failed", "unknown", "planned"}),
    "submitted": frozenset({"running", "ready", "refused", "failed", "unknown", "planned"}),
    "running": frozenset({"ready", "refused", "failed", "unknown", "planned"}),
    "ready": frozenset({"spooled", "rejected", "refused", "failed", "unknown", "planned"}),
    "spooled": frozenset({"sealed", "rejected", "planned"}),
    "sealed": frozenset(),
    "refused": frozenset({"planned"}),
    "failed": frozenset({"planned"}),
    "rejected": frozenset({"planned"}),
    "unknown": frozenset({"submitted", "planned"}),  # the provider lists its job after all; a person orders again
}
IN_FLIGHT = ("intent", "submitted", "running", "ready")
OPEN = ("planned", *IN_FLIGHT)  # what comes of the sample is not yet known
LOST = ("refused", "failed", "rejected", "unknown")  # ended without a video


def check_transition(old: str, new: str) -> None:
    """Assert that a sample in state `old` may enter `new`: an illegal step is a bug of ours."""
    assert new in TRANSITIONS[old], f"illegal transition {old} -> {new}"
