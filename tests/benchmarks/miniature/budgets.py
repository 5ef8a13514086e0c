"""What a run spent, from its own logs: seconds, updates of student and discriminator, videos drawn to learn from."""

from __future__ import annotations

from pathlib import Path

from afd_train.config import TrainConfig
from afd_train.runlog import read_metrics

Budget = dict[str, float]
TITLES = {"seconds": "seconds", "updates": "updates", "d updates": "D updates", "clips": "clips drawn"}


def budget_of(folder: Path, config: TrainConfig) -> Budget:
    """Of a finished run's TRAIN folder.

    `seconds` as the trainer counts them.  `clips`: what the student drew in its own steps; what a discriminator's
    warm-up and its held-out checks drew comes on top.
    """
    from afd_train.checkpoint import latest_checkpoint, read_state

    rows = read_metrics(folder / "metrics.jsonl")
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    steps = sum(row["step"] >= 0 for row in rows)
    return {
        "seconds": float(read_state(checkpoint)["seconds"]),
        "updates": steps * getattr(config.objective, "inner_updates", 1),
        "d updates": sum("discriminator/loss" in row for row in rows),
        "clips": steps * clips_per_step(config),
    }


def clips_per_step(config: TrainConfig) -> int:
    """Videos that the student draws in one step to learn from; a branch counts each candidate of every chunk."""
    match config.objective.name:
        case "sft" | "flow-matching":
            return 0
        case "dmd" | "distil":
            return config.prompts_per_step
    return config.prompts_per_step * config.rollouts_per_prompt
