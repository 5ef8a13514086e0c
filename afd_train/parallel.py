"""The processes of a run: the only file that knows torch.distributed, FSDP2 and accelerate's process groups.

Data-parallel training keeps a whole network a process and averages gradients itself, once a step: an update here is
several forward and backward passes, which a wrapper around `forward` would have to be told about one by one.  Where
`accelerate launch` (or `train.shard`) asks for FSDP2, weights, gradients and optimiser states are sharded instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from afd_data.errors import UserError
from afd_train.config import DiscriminatorConfig, TrainConfig
from afd_train.objective_config import ADVERSARIAL, DmdConfig
from afd_train.students.causal_wan import CausalWan

PATIENCE = timedelta(hours=6)  # of a process that waits, such as for the first one to cache the teacher's videos
BUCKET_BYTES = 2**26  # gradients are averaged in pieces of this size
TEXT_BYTES = 128  # of a text that is gathered; a prompt's id has at most 120


def open_accelerator(**settings: Any) -> Accelerator:
    """accelerate's view of this process and its like, on CPUs where there is no accelerator."""
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience], **settings)


class Processes:
    """What a training needs of its processes; with one of them every method is a plain function."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig):
        self.accelerator = accelerator
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.local_main = accelerator.is_local_main_process  # the first one of its machine
        self.device = accelerator.device
        asked = accelerator.distributed_type == DistributedType.FSDP
        self.sharded = self.count > 1 and (config.shard == "always" or (config.shard == "auto" and asked))

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, [n, ...] each -> [count n, ...], in the order in which one process has them.

        Items are dealt to processes one by one, so process r's item k is item k count + r.
        """
        if self.count == 1:
            return tensor
        own = tensor.to(self.device).contiguous()  # GPUs gather nothing from the CPU's memory
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.stack(parts, 1).flatten(0, 1).to(tensor.device)

    def gather_texts(self, texts: Sequence[str]) -> list[str]:
        """As `gather`, of texts of at most TEXT_BYTES bytes without a zero byte; as many on every process."""
        if self.count == 1:
            return list(texts)
        padded = [list(text.encode().ljust(TEXT_BYTES, b"\0")) for text in texts]
        gathered = self.gather(torch.tensor(padded, dtype=torch.uint8))
        return [bytes(row).rstrip(b"\0").decode() for row in gathered.tolist()]

    def agree(self, number: int) -> int:
        """The main process's number, on all of them."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, src=0)
        return int(value)

    def agree_text(self, text: str) -> str:
        """The main process's text, on all of them."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = self.agree(len(data))
        shared = (data if self.main else torch.zeros(size, dtype=torch.uint8)).to(self.device)
        dist.broadcast(shared, src=0)
        return bytes(shared.tolist()).decode()

    def all(self, answer: bool) -> bool:
        """Whether all processes say so."""
        return self.mean({"yes": float(answer)})["yes"] == 1.0

    def own(self, rows: Tensor) -> Tensor:
        """This process's rows of what `gather` returned."""
        return rows[self.index :: self.count]

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Averages over processes, which all have the same keys."""
        if self.count == 1 or not metrics:
            return metrics
        values = torch.tensor([*metrics.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.count).tolist(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, where they have to do as much as each other; else the own one."""
        if not self.sharded:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def average_gradients(self, gradients: Iterable[Tensor]) -> None:
        """In place; sharded ones have been averaged by FSDP2 already."""
        if self.count == 1:
            return
        for bucket in _buckets([gradient for gradient in gradients if not isinstance(gradient, DTensor)]):
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat /= self.count
            for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                gradient.copy_(mean)

    def shard(self, net: CausalWan) -> None:
        """Shard a network over all processes, block by block."""
        if not self.sharded:
            return
        # The transformer's last operation is a view; nobody writes into what it returns.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (self.count,))
        trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
        # A group of parameters must be trained in one type.  Float32 ones of a bfloat16 network are few: norms and
        # modulation stay whole, and their gradients are averaged as without sharding.
        mixed = len({parameter.dtype for parameter in trainable}) > 1
        whole = {parameter for parameter in trainable if mixed and parameter.dtype == torch.float32}
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in (*net.transformer.blocks, net.transformer):
            fully_shard(module, mesh=mesh, ignored_params=whole, mp_policy=exact)
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)

    @contextmanager
    def unsharded(self, net: CausalWan) -> Iterator[None]:
        """All weights in one piece meanwhile: a rollout is many small passes, each of which would gather them anew."""
        modules = [module for module in net.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()


def check_processes(config: TrainConfig, discriminator: DiscriminatorConfig, processes: Processes) -> None:
    """Raises UserError where the work of a step cannot be dealt to the processes."""
    shared = {"train.prompts_per_step": config.prompts_per_step}
    if config.objective.name in ADVERSARIAL:
        shared |= {
            "train.held_out_per_step": config.held_out_per_step,
            "discriminator.warmup_prompts": discriminator.warmup_prompts,
        }
    if isinstance(config.objective, DmdConfig):
        shared["train.objective.real_prompts"] = config.objective.real_prompts
    for key, prompts in shared.items():
        if prompts % processes.count:
            raise UserError(
                f"{key}: {prompts} prompts cannot be split over {processes.count} processes; choose a multiple."
            )
    if config.policy.name == "full" and config.policy.offload and processes.sharded:
        raise UserError("train.policy.offload: copies of a sharded network are sharded already; set it to false")


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, sharded or not: a scalar."""
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    plain = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [whole(torch.nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    return torch.stack(norms).norm()


def scale_gradients(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply in place, sharded or not."""
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in one piece, on every process (all must call it); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, in their order, together up to BUCKET_BYTES."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.nbytes for other in bucket) >= BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
