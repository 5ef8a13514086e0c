"""Everything needed to go on bit for bit, in formats that cannot run code: safetensors and JSON.

`checkpoints/step-000150/` holds one safetensors file a network or optimiser (a folder of them, one a process, where it
is sharded: written by torch.distributed.checkpoint), and `state.json` with the step, the streams' positions
and the sha256 of every file.  A folder under its final name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from afd_data.errors import UserError
from afd_data.files import PART, atomic_folder, file_sha256
from afd_train.parallel import Processes

FORMAT = 5
NAME = re.compile(r"step-(\d+)")


@dataclass
class Parts:
    """What a checkpoint holds beside its state: tensors of networks, by name, and optimisers.

    The tensors are the live ones: they are restored in place.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    optimizers: Mapping[str, torch.optim.AdamW]

    def all(self) -> dict[str, Mapping[str, Tensor]]:
        """Networks, and `NAME.optimizer` with the optimisers' states."""
        states = {f"{name}.optimizer": _optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        return {**self.tensors, **states}


def save_checkpoint(folder: Path, parts: Parts, state: dict[str, Any], processes: Processes) -> None:
    """Write a checkpoint, all processes together; under its final name it is complete and on disk."""
    with atomic_folder(folder) if processes.main else nullcontext(folder.with_name(folder.name + PART)) as part:
        processes.wait()
        for name, tensors in parts.all().items():
            if _sharded(tensors):
                _save_sharded(part / name, tensors)
            elif processes.main:
                save_file(
                    {key: value.cpu().contiguous() for key, value in tensors.items()}, part / f"{name}.safetensors"
                )
        processes.wait()
        if processes.main:
            files = sorted(path for path in part.rglob("*") if path.is_file())
            digests = {path.relative_to(part).as_posix(): file_sha256(path) for path in files}
            about = {"format": FORMAT, **state, "sha256": digests}
            (part / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    processes.wait()


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json`, without a look at the other files; raises UserError when it is no state of this format."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, _ = state["format"], dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/state.json: not a checkpoint's state ({error}). {_advice(folder)}") from None
    if version != FORMAT:
        raise UserError(f"{folder}: checkpoint format {version}, this afd reads {FORMAT}. {_advice(folder)}")
    return state


def load_state(folder: Path) -> dict[str, Any]:
    """The checked `state.json`; raises UserError when a file is missing or differs from its sha256."""
    state = read_state(folder)
    for name, digest in state["sha256"].items():
        if not _intact(folder, name, digest):
            raise UserError(f"{folder}/{name}: missing, or its sha256 is not the one in state.json. {_advice(folder)}")
    return state


def load_checkpoint(folder: Path, parts: Parts) -> dict[str, Any]:
    """Restore networks and optimisers in place and return the state.

    Raises UserError when a file is damaged, before anything is touched, or does not fit.
    """
    state = load_state(folder)
    for name, tensors in parts.all().items():
        if _sharded(tensors):
            _load_sharded(folder / name, tensors)
        else:
            _restore(tensors, _read(folder, name), f"{folder}/{name}.safetensors")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the newest last."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    found = checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """Steps done when it was saved."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_states(folder: Path) -> list[dict[str, Any]]:
    """As `read_state`, of all checkpoints in `folder` that can be gone on from, the newest last."""
    states = []
    for path in checkpoints(folder):
        with suppress(UserError):
            states.append(read_state(path))
    return states


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def _advice(folder: Path) -> str:
    return f"Delete {folder} to go on from the checkpoint before it."


def _intact(folder: Path, name: str, digest: str) -> bool:
    """Whether a file inside the folder has this sha256; names come from a file that may be anything."""
    try:
        path = (folder / name).resolve()
        return path.is_relative_to(folder.resolve()) and path.is_file() and file_sha256(path) == digest
    except (OSError, ValueError, TypeError):
        return False


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _restore(targets: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    odd = sorted(targets.keys() ^ found.keys())
    odd += sorted(name for name in targets.keys() & found.keys() if targets[name].shape != found[name].shape)
    if odd:
        raise UserError(f"{where} does not fit this recipe's network: {odd[0]} is missing, unknown or of another shape")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found[name])


def _optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The live state as `INDEX.NAME` -> tensor; made where no step was taken yet, as AdamW itself would make it."""
    tensors = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        entry = optimizer.state[parameter]
        if not entry:
            zeros = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            entry.update({"step": torch.tensor(0.0), **zeros})
        tensors |= {f"{index}.{name}": value for name, value in entry.items()}
    return tensors


def _sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def _save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    # Its own format would pickle; this one writes safetensors, one file a process.
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer)


def _load_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(path=str(folder)))
    except (dcp.api.CheckpointException, OSError, SafetensorError) as error:
        raise UserError(f"{folder} does not fit this recipe's network, or is damaged: {error}") from None
