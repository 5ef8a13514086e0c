"""Each prompt's margin over the steps of a run: kept in checkpoints, written for a refresh of the teacher's videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor

from afd_data.examples import Example
from afd_data.margins import Margin, write_margins
from afd_train.parallel import Processes

MEMORY = 0.5  # weight of the past; a prompt comes once an epoch, and the discriminator has learned meanwhile


class Margins:
    """Exponential averages by prompt, the same on all processes."""

    def __init__(self) -> None:
        self._rows: dict[str, Margin] = {}

    def add(self, examples: Sequence[Example], margins: Tensor, step: int, processes: Processes) -> None:
        """A step's margins, [P], of this process's examples; all processes call it."""
        prompts = processes.gather_texts([example.prompt_id for example in examples])
        generations = processes.gather(torch.tensor([example.generation for example in examples])).tolist()
        values = processes.gather(margins.float()).tolist()
        for prompt, margin, generation in zip(prompts, values, generations, strict=True):
            before = self._rows.get(prompt)
            mean = margin if before is None else MEMORY * before.margin + (1 - MEMORY) * margin
            count = 1 if before is None else before.count + 1
            self._rows[prompt] = Margin(prompt, mean, step, count, generation)

    def rows(self) -> list[Margin]:
        """Of all prompts that were drawn so far."""
        return list(self._rows.values())

    def write(self, path: Path) -> None:
        """Where nothing was measured, no file is written."""
        if self._rows:
            write_margins(path, self._rows.values())

    def state_dict(self) -> list:
        """JSON-able."""
        return [list(astuple(row)) for row in self._rows.values()]

    def load_state_dict(self, state: Sequence[Sequence]) -> None:
        """Inverse of `state_dict`."""
        rows = [Margin(*row) for row in state]
        self._rows = {row.prompt_id: row for row in rows}
