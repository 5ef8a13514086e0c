"""The policies of a run over one network: the student that learns, and the old, reference, averaged and best ones.

A policy that is not learning is a list of weights which act in the network for the length of a `with` block
(`Trainee.acting`), so that none can be left switched on.  Weights that are trained in bfloat16 have a float32 master
here: an optimiser's step, and still more an average's, is smaller than what bfloat16 can tell apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from afd_train.config import LoraConfig, TrainConfig
from afd_train.objective_config import OldPolicy
from afd_train.optimizer import Optimizer, learning_rate_factor
from afd_train.parallel import Processes
from afd_train.students.causal_wan import CausalWan

Net = TypeVar("Net", bound=nn.Module)
Policy = Literal["student", "ema", "old", "reference", "behind", "best"]

ADAPTER = "default"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")


def frozen_copy(net: Net) -> Net:
    """A copy without gradients."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def old_policy_decay(config: OldPolicy, step: int) -> float:
    """d of old <- d old + (1 - d) student after update `step`, counted from 1: DiffusionNFT's schedules, and an EMA."""
    match config.old_policy_schedule:
        case "ema":
            return config.old_policy_decay
        case "copy":
            return 0.0
        case "ramp":
            return min(0.001 * step, 0.5)
        case "late-ramp":
            return min(max(0.0, 0.0075 * (step - 75)), 0.999)


class Trainee:
    """A network that learns: trainable weights, optimiser, learning rate schedule, and the policies beside it."""

    def __init__(
        self, net: CausalWan, config: TrainConfig, processes: Processes, seed: int = 0, policies: Sequence[Policy] = ()
    ):
        """`policies`: those that an objective needs beside the student and its evaluation average, `ema`."""
        self.net = net
        self._config = config
        self._adapted = isinstance(config.policy, LoraConfig)
        if isinstance(config.policy, LoraConfig):
            _adapt(net, config.policy, seed)
        if config.gradient_checkpointing:
            net.transformer.enable_gradient_checkpointing()
        processes.shard(net)
        self.names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.optimizer = Optimizer(
            self.parameters, processes, config.max_grad_norm, config.weight_decay, betas=(0.9, 0.99)
        )
        offload = config.policy.name == "full" and config.policy.offload
        self._home = torch.device("cpu") if offload else None
        # An adapted network's reference is the network without its adapter.
        kept = [name for name in ("ema", *policies) if not (name == "reference" and self._adapted)]
        self.copies = {name: self._copy(exact=name != "reference") for name in kept}
        self._acting: Policy = "student"

    def _copy(self, exact: bool) -> list[Tensor]:
        source = self.optimizer.masters if exact else self.parameters
        return [tensor.detach().clone() if self._home is None else tensor.detach().to(self._home, copy=True)
                for tensor in source]  # fmt: skip

    @contextmanager
    def acting(self, policy: Policy) -> Iterator[CausalWan]:
        """The network with this policy's weights inside the block; without gradient unless it is the student's.

        Compute what other policies say before the student's own pass: its graph does not survive the exchange.
        """
        if self._acting != "student":
            raise RuntimeError(f"policy {self._acting} is acting; it must end before {policy} can act")
        if policy == "student":
            yield self.net
            return
        self._acting = policy
        try:
            with torch.no_grad(), self._exchanged(policy):
                yield self.net
        finally:
            self._acting = "student"

    @contextmanager
    def _exchanged(self, policy: Policy) -> Iterator[None]:
        if policy == "reference" and self._adapted:
            self.net.transformer.disable_adapters()
            try:
                yield
            finally:
                self.net.transformer.enable_adapters()
            return
        own = [parameter.detach().clone() for parameter in self.parameters]
        try:
            for parameter, value in zip(self.parameters, self.copies[policy], strict=True):
                parameter.copy_(value)
            yield
        finally:
            for parameter, value in zip(self.parameters, own, strict=True):
                parameter.copy_(value)

    def adapter_state(self) -> dict[str, Tensor] | None:
        """The acting policy's adapter under PEFT's names, live; None where all weights are trained."""
        if not self._adapted:
            return None
        import peft

        return peft.get_peft_model_state_dict(self.net.transformer, adapter_name=ADAPTER)

    def accumulate(self, loss: Tensor) -> None:
        """Add a part of the step's loss."""
        assert self._acting == "student"
        self.optimizer.accumulate(loss)
        self.net.end_pass()

    def step(self, step: int) -> float:
        """One optimiser step on what was accumulated; returns the gradient's norm before clipping."""
        assert self._acting == "student"
        norm = self.optimizer.step(self._config.learning_rate * learning_rate_factor(step, self._config))
        self.follow("ema", self._config.evaluation_ema)
        return norm

    @torch.no_grad()
    def follow(self, policy: Policy, decay: float) -> None:
        """policy <- decay policy + (1 - decay) student, weight by weight, in float32."""
        for mean, master in zip(self.copies[policy], self.optimizer.masters, strict=True):
            mean.lerp_(master.detach().to(mean.device), 1 - decay)

    @torch.no_grad()
    def keep_best(self) -> None:
        """best <- ema."""
        for best, mean in zip(self.copies["best"], self.copies["ema"], strict=True):
            best.copy_(mean)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: the student's masters and every copy that moves, by name; they are the live tensors.

        The reference is what the run starts from and is made again.
        """
        moving = {"student": self.optimizer.masters, **self.copies}
        moving.pop("reference", None)
        return {
            policy: dict(zip(self.names, (tensor.detach() for tensor in tensors), strict=True))
            for policy, tensors in moving.items()
        }


def _adapt(net: CausalWan, config: LoraConfig, seed: int) -> None:
    """Freeze the network and add an adapter that changes nothing yet, in the type of the weights it adapts."""
    import peft

    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.transformer.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                target_modules=list(lora_targets(config)),
                init_lora_weights="gaussian",
            ),
            ADAPTER,
        )
    dtype = net.transformer.patch_embedding.weight.dtype
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def lora_targets(config: LoraConfig) -> tuple[str, ...]:
    """The linear layers of a block that are adapted."""
    return ATTENTION if config.targets == "attention" else ATTENTION + FEED_FORWARD


def plain_state(net: CausalWan) -> dict[str, Tensor]:
    """The transformer's weights under stock names, adapters left out; live tensors."""
    state = net.transformer.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
