"""One optimiser step on gradients that were accumulated: AdamW in float32, clipped, averaged over processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afd_train.config import TrainConfig
from afd_train.parallel import Processes, gradient_norm, scale_gradients

Snapshot = tuple[list[Tensor], dict[str, Any]]


class Optimizer:
    """AdamW in float32 over weights of any type, with clipped gradients that are averaged over the processes.

    masters: for every parameter its float32 original, the parameter itself where that is float32.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        processes: Processes,
        max_grad_norm: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        self._processes = processes
        self._max_grad_norm = max_grad_norm
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        # One tensor at a time: for all at once it would need as much memory again as what it trains.
        self.adamw = torch.optim.AdamW(self.masters, lr=1.0, weight_decay=weight_decay, betas=betas, foreach=False)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, in float32."""
        loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self, rate: float) -> float:
        """Apply what was accumulated at this learning rate; returns the gradient's norm before clipping.

        A norm that is not finite leaves the weights as they were; the trainer's alarm sees it in the log.
        """
        gradients = [master.grad for master in self.masters if master.grad is not None]
        self._processes.average_gradients(gradients)
        norm = float(gradient_norm(gradients))
        if math.isfinite(norm):
            scale_gradients(gradients, min(1.0, self._max_grad_norm / (norm + 1e-6)))
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
            self.synchronise()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def exact(self, net: nn.Module) -> dict[str, Tensor]:
        """The state of the network that is optimised, masters in the place of its weights; live tensors.

        Weights that are not trained are left out: whoever opens the network again brings them along.
        """
        masters: dict[Tensor, Tensor] = dict(zip(self.parameters, self.masters, strict=True))
        state: dict[str, Tensor] = net.state_dict(keep_vars=True)
        moving = {key: value for key, value in state.items() if value in masters or not isinstance(value, nn.Parameter)}
        return {name: masters.get(value, value).detach() for name, value in moving.items()}

    def snapshot(self) -> Snapshot:
        """A copy of the weights that are trained and of what AdamW remembers."""
        return [master.detach().clone() for master in self.masters], copy.deepcopy(self.adamw.state_dict())

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot."""
        weights, state = snapshot
        for master, weight in zip(self.masters, weights, strict=True):
            master.copy_(weight)
        self.adamw.load_state_dict(state)
        self.synchronise()

    @torch.no_grad()
    def synchronise(self) -> None:
        """Round the masters into the network's weights."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear rise over `warmup_steps`, then a cosine from 1 to `final_learning_rate` at the last step."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = step / max(config.steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)
