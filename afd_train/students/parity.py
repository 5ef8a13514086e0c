"""Does this code compute what the original does?  `python -m afd_train.students.parity FOLDER` answers for a recording.

FOLDER holds weights.safetensors (a small transformer under the original's names), config.json (its sizes) and
tensors.safetensors (`GROUP.NAME`: what went into the original code and what came out).  Everything goes through the
public loader, network and rollout.  Exit code 0: every tensor was checked and is within 1e-5; 1: one of them is not,
is unknown, or lacks another that it needs; 2: no such folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afd_data.errors import UserError
from afd_train.flow import clean_from_velocity, nearest_time, noised, schedule, table
from afd_train.rollout import Sampler, rollout
from afd_train.students.causal_wan import TRAIN_TIMESTEPS
from afd_train.students.recording import MissingTensor, RecordedNoise, Recording, read_recording

TOLERANCE = 1e-5  # largest absolute difference in float32; timesteps count as times in [0, 1]
_TIMESTEPS = ("timestep", "timesteps", "steps", "steps_first_chunk")

_USUAL = {"1": (1000,), "2": (1000, 500), "4": (1000, 750, 500, 250)}  # steps by their number

Outputs = dict[str, tuple[str, Tensor]]  # name within its group -> (what computed it, its value)


@dataclass(frozen=True)
class Row:
    """A tensor's line of the table: its largest absolute error if it was computed, and what is wrong with it."""

    name: str
    against: str
    error: float | None = None
    problem: str | None = None


def compare(recording: Recording) -> list[Row]:
    """A row for every tensor of a recording, and for every one that config.json promises."""
    groups = list(dict.fromkeys(name.partition(".")[0] for name in recording.tensors))
    results: dict[str, Outputs | str] = {}
    with torch.no_grad():
        for group in groups:
            try:
                results[group] = outputs(group, recording)
            except MissingTensor as error:
                results[group] = str(error)
            except Exception as error:  # tensors of unfitting shapes can fail anywhere in the network
                results[group] = f"cannot be computed: {str(error).strip().splitlines()[0]}"
    rows = [_row(name, results[name.partition(".")[0]], recording) for name in recording.tensors]
    absent = [name for name in recording.promised if name not in recording.tensors]
    return rows + [Row(name, "config.json", problem="is not in tensors.safetensors") for name in absent]


def _row(name: str, result: Outputs | str, recording: Recording) -> Row:
    value, (group, _, short) = recording.tensors[name], name.partition(".")
    shape = recording.promised.get(name, list(value.shape))
    if not value.isfinite().all():
        return Row(name, "finite numbers", problem="holds NaN or infinity")
    if shape != list(value.shape):
        return Row(name, "config.json", problem=f"has shape {list(value.shape)} instead of {shape}")
    if isinstance(result, str):
        return Row(name, group, problem=result)
    if short not in result:
        known = name in recording.used
        return Row(name, "input" if known else "nothing", problem=None if known else "unknown")
    against, computed = result[short]
    if computed.shape != value.shape:
        return Row(name, against, problem=f"has shape {list(value.shape)}, computed: {list(computed.shape)}")
    error = float((computed.double() - value.double()).abs().max()) if value.numel() else 0.0
    error /= TRAIN_TIMESTEPS if short in _TIMESTEPS else 1
    return Row(name, against, error, None if error <= TOLERANCE else f"above {TOLERANCE:g}")


def outputs(group: str, recording: Recording) -> Outputs:
    """What our code makes of the inputs of a group.  Raises MissingTensor when one is not there."""
    match group:
        case "in":
            return _inputs(recording)
        case "scheduler":
            return _scheduler(recording)
        case "train":
            return _noisy_context(recording, "forward", {})
        case "train_window":
            return _noisy_context(recording, "forward in a window", recording.window | {"sink": 0})
        case "tf":
            return _clean_context(recording, recording["in.clean"], None)
        case "tf_aug":
            return _clean_context(recording, recording["tf_aug.context"], recording.times("tf_aug.timestep"))
        case "cached":
            return _cached(recording)
        case _ if group == "train_rollout" or group.startswith("rollout"):
            return _rolled_out(group, recording)
        case _:
            return {}


def _inputs(recording: Recording) -> Outputs:
    clean, noise, sigma = recording["in.clean"], recording["in.noise"], _sigma("in.timestep", recording)
    return {"noisy": ("flow.noised", noised(clean, noise, sigma))}


def _scheduler(recording: Recording) -> Outputs:
    times = table(recording.config.shift)
    return {
        "timesteps": ("flow.table", times * TRAIN_TIMESTEPS),
        "sigmas": ("flow.table", times),
        "train_weight": ("bell over the timesteps", _train_weight(times)),
    }


def _train_weight(times: Tensor) -> Tensor:
    """The weight that the original's training from scratch gives to the entries of its schedule: mean 1, least 0."""
    bell = torch.exp(-2 * (times - 0.5) ** 2)
    weight = bell - bell.min()
    return weight / weight.mean()


def _noisy_context(recording: Recording, against: str, window: dict[str, int]) -> Outputs:
    net = recording.net(recording.student(**window))
    v = net(recording["in.noisy"], recording.times("in.timestep"), recording.text())
    return _prediction(recording, against, v)


def _clean_context(recording: Recording, context: Tensor, t: Tensor | None) -> Outputs:
    net, text = recording.net(recording.config), recording.text()
    v = net(recording["in.noisy"], recording.times("in.timestep"), text, context, t)
    return _prediction(recording, "forward, teacher forcing", v)


def _prediction(recording: Recording, against: str, v: Tensor) -> Outputs:
    clean = clean_from_velocity(recording["in.noisy"], v, _sigma("in.timestep", recording))
    return {"flow": (against, v), "x0": (against, clean)}


def _sigma(name: str, recording: Recording) -> Tensor:
    """The times of the schedule that are nearest to recorded timesteps, in float32."""
    return recording.times(name).apply_(lambda t: nearest_time(t, recording.config.shift)).float()


def _cached(recording: Recording) -> Outputs:
    """Chunk after chunk: a pass over the noisy one, then the clean one is remembered."""
    net, text = recording.net(recording.config), recording.text()
    noisy, clean, t = recording["in.noisy"], recording["in.clean"], recording.times("in.timestep")
    cache, flow, clean_flow = net.memory(clean.shape[1]), [], []
    for i in range(0, clean.shape[1], net.chunk_frames):
        own = slice(i, i + net.chunk_frames)
        flow.append(net.chunk(noisy[:, own], t[:, own], text, cache))
        clean_flow.append(net.chunk(clean[:, own], torch.zeros_like(t[:, own]), text, cache))
        net.remember(clean[:, own], text, cache)
    found = _prediction(recording, "chunk on a cache", torch.cat(flow, 1))
    found["clean_pass_flow"] = "chunk on a cache, t = 0", torch.cat(clean_flow, 1)
    for letter, store in (("k", cache.keys), ("v", cache.values)):
        found |= {f"{letter}_layer{layer}": ("KVCache after remember", value) for layer, value in store.items()}
        found[f"{letter}_last"] = "KVCache after remember", store[max(store)]
    return found


def _rolled_out(group: str, recording: Recording) -> Outputs:
    """Any rollout: with `i2v` in its name from the first clean frame on, with `window` in a window."""
    latents, window = recording[f"{group}.latents"], recording.window if "window" in group else {}
    config = recording.student(**_steps(group, recording), **window)
    sampler = Sampler.of(config, training=group == "train_rollout")
    batch = slice(len(latents))
    prefix = recording["in.clean"][batch, :1] if "i2v" in group else None
    starts = recording["in.noise"][batch, 0 if prefix is None else 1 :][:, : latents.shape[1]]
    injected = starts[:0] if f"{group}.injected" not in recording.tensors else recording[f"{group}.injected"]
    noise = RecordedNoise.of(starts, injected, sampler, config.chunk_frames)
    text, chunks = recording.text()[batch], starts.shape[1] // config.chunk_frames
    clips = rollout(recording.net(config), text, noise, sampler, chunks, prefix).clips
    found = {
        "latents": ("rollout", clips[:, -latents.shape[1] :]),  # image to video may be recorded without its image
        "steps": ("flow.schedule", _timesteps(config.steps, config.shift)),
        "context_sigma": ("flow.nearest_time", torch.tensor([sampler.context_noise])),
    }
    if config.first_chunk_steps:
        found["steps_first_chunk"] = "flow.schedule", _timesteps(config.first_chunk_steps, config.shift)
    return found


def _steps(group: str, recording: Recording) -> dict[str, tuple[int, ...]]:
    """The steps of a rollout as a recipe would name them; where they are not recorded, the usual ones of its name."""
    found: dict[str, tuple[int, ...]] = {}
    for ours, theirs in (("steps", "steps"), ("first_chunk_steps", "steps_first_chunk")):
        if f"{group}.{theirs}" in recording.tensors:
            found[ours] = _unwarped(recording.times(f"{group}.{theirs}"), recording.config.shift)
    if "steps" not in found:
        last = group[-1] if group[-1] in _USUAL else "2" if "window" in group else "4"
        found["steps"] = _USUAL[last]
    if "first4" in group:
        found.setdefault("first_chunk_steps", _USUAL["4"])
    return found


def _unwarped(times: Tensor, shift: float) -> tuple[int, ...]:
    """The inverse of flow.schedule, rounded to whole steps."""
    return tuple((1000 * times / (shift - (shift - 1) * times)).round().int().tolist())


def _timesteps(steps: tuple[int, ...], shift: float) -> Tensor:
    return torch.tensor(schedule(steps, shift), dtype=torch.float64) * TRAIN_TIMESTEPS


def show(rows: list[Row]) -> str:
    """The table: tensor, what it was compared with, largest absolute error, verdict."""
    cells = [("tensor", "compared with", "max error", "verdict")]
    for row in rows:
        error = "-" if row.error is None else f"{row.error:.1e}"
        cells.append((row.name, row.against, error, f"FAILS: {row.problem}" if row.problem else "ok"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main(arguments: list[str] | None = None) -> int:
    """The command.  Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m afd_train.students.parity", description="Compare with recorded tensors."
    )
    parser.add_argument("folder", type=Path, help="weights.safetensors, tensors.safetensors, config.json")
    try:
        rows = compare(read_recording(parser.parse_args(arguments).folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = sum(row.problem is not None for row in rows)
    print(show(rows))
    print(f"{len(rows)} tensors, {failed} failed; tolerance {TOLERANCE:g}")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
