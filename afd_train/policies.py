"""Current, old, reference and evaluation policies over one architecture.

`Trainee` is the network that learns, with its optimiser and its evaluation average.  Old and reference policies are
plain copies made by `frozen_copy`; `ema_update` moves one towards another.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from afd_train.config import TrainConfig
from afd_train.students.causal_wan import CausalWan

Net = TypeVar("Net", bound=nn.Module)


def frozen_copy(net: Net) -> Net:
    """A copy without gradients."""
    return copy.deepcopy(net).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * net, parameter by parameter."""
    for mean, value in zip(average.parameters(), net.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


class Trainee:
    """A network that learns: AdamW, learning rate schedule, clipped gradients, evaluation EMA."""

    def __init__(self, net: CausalWan, config: TrainConfig, accelerator: Accelerator):
        self.net = net
        self.evaluation = frozen_copy(net)
        self.optimizer = torch.optim.AdamW(
            net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self._config = config
        self._accelerator = accelerator

    def update(self, loss: Tensor, step: int) -> float:
        """One optimiser step on `loss`; returns the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate * learning_rate_factor(step, self._config)
        norm = descend(self._accelerator, self.optimizer, loss, self._config.max_grad_norm)
        ema_update(self.evaluation, self.net, self._config.evaluation_ema)
        return norm


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear rise over `warmup_steps`, then a cosine from 1 to `final_learning_rate` at the last step."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = step / max(config.steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def descend(accelerator: Accelerator, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> float:
    """Gradients of `loss`, averaged over processes and clipped, applied.  Returns their norm before clipping.

    A norm that is not finite leaves the weights as they were; the trainer's alarm sees it in the log.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")  # pyright: ignore[reportAttributeAccessIssue]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if math.isfinite(norm):
        optimizer.step()
    return norm
