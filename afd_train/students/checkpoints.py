"""Weights of a Wan transformer from wherever people keep them -> one dict with diffusers names, and into a network.

Reads .pt and .pth files of the original training codes, .safetensors, diffusers folders and the Hub; in the original's
names or diffusers'.  Nothing that it reads can run code.  Knows nothing of recipes and student folders.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from afd_data.errors import UserError
from afd_train.hub import local_path
from afd_train.students.keys import layout_of, listed, to_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9
# Networks of a training code's file, the one to take first; their names may carry the segments of wrappers.
NETWORKS = ("generator_ema", "generator", "model")
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
PREFIXES = ("model.diffusion_model.", "model.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(source: str | Path, key: str | None, what: str) -> dict[str, Tensor]:
    """The weights in `source` under diffusers names, in its own precision, on the CPU.

    source: .pt, .pth or .safetensors file, folder with diffusers weights (or with `transformer/` that has them), or
    hf://OWNER/REPO[@REVISION][/PATH].  key: the network of a .pt file; default `generator_ema`, else `generator`, else
    `model`, else the file itself.  what: the recipe's key or the command's argument, for messages.
    Tensors may be views of the file: copy what has to outlive it.  Raises UserError for what cannot be read.
    """
    path = local_path(source, what)
    where = f"{what}: {path}"
    if path.is_dir():
        state = _read_folder(path, where)
    elif not path.exists():
        raise UserError(f"{where}: there is no such file or folder")
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path, where)
    elif path.suffix in (".pt", ".pth"):
        state = _network(_unpickled(path, where), key, where)
    else:
        raise UserError(f"{where}: not a .pt, .pth or .safetensors file and not a folder with diffusers weights")
    return _with_diffusers_names(state, where)


def load_weights(transformer: WanTransformer3DModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Put `weights` (diffusers names) in place of the transformer's, which may be on the meta device; none is copied.

    where: subject of the message.  Raises UserError that lists what is missing, unknown or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    missing = [name for name in wanted if name not in weights]
    unknown = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} {list(value.shape)} instead of {list(wanted[name])}"
        for name, value in weights.items()
        if name in wanted and tuple(value.shape) != wanted[name]
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(kinds.values()):
        problems = [f"{len(names)} tensors {kind}: {listed(names)}" for kind, names in kinds.items() if names]
        raise UserError(f"{where}: the weights do not fit the network; " + "; ".join(problems))
    transformer.load_state_dict(dict(weights), assign=True)


def write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors as diffusers does: one .safetensors file, or several with an index above SHARD_BYTES."""
    split = split_torch_state_dict_into_shards(
        dict(state),
        filename_pattern=WEIGHTS.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        save_tensors({name: state[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one .safetensors file that whoever may read the folder may read."""
    path.touch()
    mode = path.stat().st_mode  # as the user's umask has it; safetensors makes files for their owner only
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(on_cpu, path, metadata={"format": "pt"})
    path.chmod(mode)


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """What shapes tell of a network, in the words of a student's configuration; not its heads, see `heads_of`.

    weights: diffusers names.  Keys: layers, dim, ffn_dim, text_dim, frequency_dim, and the latent's channels that go
    in and come out; one is left out when its tensor is.
    """
    patch, blocks = 4, {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return {"layers": len(blocks)} | {
        key: weights[name].shape[axis] // (patch if key == "channels_out" else 1)
        for key, (name, axis) in _SIZES.items()
        if name in weights and weights[name].ndim > axis
    }


def heads_of(path: Path) -> dict[str, int]:
    """{"heads": what the config.json of a diffusers folder states}; empty where nothing is stated."""
    for file in (path / "config.json", path / "transformer" / "config.json"):
        try:
            heads = json.loads(file.read_text(encoding="utf-8"))["num_attention_heads"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return {"heads": heads} if isinstance(heads, int) else {}
    return {}


_SIZES = {
    "dim": ("patch_embedding.weight", 0),
    "ffn_dim": ("blocks.0.ffn.net.0.proj.weight", 0),
    "text_dim": ("condition_embedder.text_embedder.linear_1.weight", 1),
    "frequency_dim": ("condition_embedder.time_embedder.linear_1.weight", 1),
    "channels_in": ("patch_embedding.weight", 1),
    "channels_out": ("proj_out.weight", 0),
}


def _read_folder(folder: Path, where: str) -> dict[str, Any]:
    for place in (folder, folder / "transformer"):
        if (place / INDEX).is_file():
            return _read_shards(place, f"{where}: {INDEX}")
        if (place / WEIGHTS).is_file():
            return _read_safetensors(place / WEIGHTS, f"{where}: {WEIGHTS}")
    raise UserError(f"{where}: the weights are missing ({WEIGHTS}, or its index, here or in transformer/)")


def _read_shards(folder: Path, where: str) -> dict[str, Any]:
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: not an index of weights") from None
    for file in files:
        # Shards lie beside their index: an index from a stranger must not reach for anything else.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise UserError(f"{where}: names {file!r}, which is not a file beside it")
        if not (folder / file).is_file():
            raise UserError(f"{where}: names {file}, which is missing; fetch the folder again")
    shards = {file: _read_safetensors(folder / file, f"{where}: {file}") for file in files}
    found = {name: file for file, shard in shards.items() for name in shard}
    if found != places or len(found) != sum(map(len, shards.values())):
        odd = sorted(name for name, _ in found.items() ^ places.items())
        raise UserError(f"{where}: does not agree with its shards: {listed(dict.fromkeys(odd))}")
    return {name: value for shard in shards.values() for name, value in shard.items()}


def _read_safetensors(path: Path, where: str) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: not a readable safetensors file ({_line(error)}); fetch it again") from None


def _unpickled(path: Path, where: str) -> Any:
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{where}: not a checkpoint of tensors alone ({_line(error)}). Code in a checkpoint is never run; "
            "ask for a .safetensors file."
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        # What torch says is an advice to unpickle it.
        raise UserError(f"{where}: damaged, or it holds more than tensors and is not safe to open") from error


def _network(content: Any, key: str | None, where: str) -> dict[str, Any]:
    """The network of a .pt file that `key`, or the order of NETWORKS, chooses."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, not a dict of tensors")
    if key is not None and key not in content:
        keys = listed(map(str, content))
        raise UserError(f"{where}: has no {key!r}; keys there are: {keys}. Set student.init_key to one, or to null.")
    found = [name for name in NETWORKS if isinstance(content.get(name), dict)]
    if key is None and not found:
        if any(isinstance(value, dict) for value in content.values()):
            raise UserError(f"{where}: none of {', '.join(NETWORKS)} in it, but {listed(map(str, content))}")
        return content
    chosen = content[found[0] if key is None else key]
    if not isinstance(chosen, dict):
        raise UserError(f"{where}: {key!r} is a {type(chosen).__name__}, not a dict of tensors")
    return chosen


def _with_diffusers_names(state: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    tidy: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor; not the weights of a network"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided or value.device.type != "cpu":
            kind = f"{value.dtype}, {value.layout}, {value.device.type}".replace("torch.", "")
            raise UserError(f"{where}: {name} is {kind}; weights in float32, bfloat16 or float16 are read")
        short = _tidy(name)
        if short in tidy:
            raise UserError(f"{where}: {short} is there twice, once as {name}")
        tidy[short] = value.detach()
    try:
        return tidy if layout_of(tidy) == "diffusers" else to_diffusers(tidy)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _tidy(name: str) -> str:
    """Without what FSDP, gradient checkpointing, torch.compile and the object that holds the network add."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _line(error: BaseException) -> str:
    """The first line: torch explains at length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
