"""Everything needed to go on bit for bit, in formats that cannot run code: safetensors and JSON.

`checkpoints/step-000150/` holds one safetensors file a network, one an optimiser, and `state.json` with the step, the
streams' positions, the optimisers' settings and the sha256 of every file.  A folder under its final name is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_data.files import atomic_folder, file_sha256

FORMAT = 1


@dataclass
class Parts:
    """What a checkpoint holds beside its state: networks and optimisers by name."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]


def save_checkpoint(folder: Path, parts: Parts, state: dict[str, Any]) -> None:
    """Write a checkpoint; under its final name it is complete and on disk."""
    files = {}
    for name, module in parts.modules.items():
        files[name] = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    groups = {}
    for name, optimizer in parts.optimizers.items():
        files[f"{name}.optimizer"], groups[name] = _optimizer_tensors(optimizer)
    with atomic_folder(folder) as part:
        for name, tensors in files.items():
            save_file(tensors, part / f"{name}.safetensors")
        digests = {path.name: file_sha256(path) for path in sorted(part.iterdir())}
        about = {"format": FORMAT, **state, "optimizers": groups, "sha256": digests}
        (part / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """The checked `state.json`; raises UserError when a file is missing or differs from its sha256."""
    advice = f"Delete {folder} to go on from the checkpoint before it."
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version, digests = state["format"], dict(state["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json: not a checkpoint's state ({error}). {advice}") from None
    if version != FORMAT:
        raise UserError(f"{folder}: checkpoint format {version}, this afd reads {FORMAT}. {advice}")
    for name, digest in digests.items():
        path = folder / Path(name).name
        if not path.is_file() or file_sha256(path) != digest:
            raise UserError(f"{path}: missing, or its sha256 is not the one in state.json. {advice}")
    return state


def load_checkpoint(folder: Path, parts: Parts, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Restore networks and optimisers in place and return the state, which `check` sees before anything is touched.

    Raises UserError when a file is damaged or does not fit.
    """
    state = load_state(folder)
    check(state)
    for name, module in parts.modules.items():
        try:
            module.load_state_dict(_read(folder, name))
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"{folder}/{name}.safetensors does not fit this recipe's network: {first}") from None
    for name, optimizer in parts.optimizers.items():
        try:
            _restore_optimizer(optimizer, _read(folder, f"{name}.optimizer"), state["optimizers"][name])
        except (KeyError, ValueError) as error:
            raise UserError(f"{folder}/{name}.optimizer.safetensors does not fit this recipe: {error}") from None
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)
    return found[-1] if found else None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`."""
    found = sorted(path for path in folder.glob("step-*") if path.is_dir() and not path.suffix)
    for path in found[:-keep]:
        shutil.rmtree(path)


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state as `INDEX.NAME` -> tensor, and the parameter groups, which are JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, state["param_groups"]


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
