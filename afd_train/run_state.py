"""What a checkpoint keeps of a run: the tensors that training moves, and everything that was counted beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afd_train.alarms import Alarms
from afd_train.best import Best
from afd_train.checkpoint import Parts
from afd_train.feed import Feed
from afd_train.margins import Margins
from afd_train.objectives import Objective
from afd_train.objectives.judged import judge_of
from afd_train.policies import Trainee


@dataclass
class RunState:
    """The live parts of one phase."""

    trainee: Trainee
    objective: Objective
    feed: Feed
    margins: Margins
    best: Best
    alarms: Alarms

    def parts(self) -> Parts:
        """The same tensors that training moves."""
        own = self.objective.optimizers
        others = {
            name: own[name].exact(net) if name in own else net.state_dict()
            for name, net in self.objective.modules.items()
        }
        optimizers = {"student": self.trainee.optimizer, **own}
        return Parts({**self.trainee.state(), **others}, {name: each.adamw for name, each in optimizers.items()})

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: everything else."""
        judge = judge_of(self.objective)
        return {
            "data": self.feed.state_dict(),
            "margins": self.margins.state_dict(),
            "band": judge.controller.state_dict() if judge else None,
            "best": self.best.state_dict(),
            "alarms": self.alarms.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, after the tensors were restored."""
        for optimizer in (self.trainee.optimizer, *self.objective.optimizers.values()):
            optimizer.synchronise()
        self.feed.load_state_dict(state["data"])
        self.margins.load_state_dict(state["margins"])
        if judge := judge_of(self.objective):
            judge.controller.load_state_dict(state["band"])
        self.best.load_state_dict(state["best"])
        self.alarms.load_state_dict(state["alarms"])
