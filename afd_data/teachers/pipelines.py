"""A pipeline of diffusers by folder or Hub name: found, checked without loading it, loaded safely.

torch and diffusers are imported when something is asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afd_data.errors import UserError
from afd_data.hub import checked_name, explained_reading, short
from afd_data.teacher_config import LocalConfig
from afd_data.teachers import FailedError

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"
CONFIGS, WEIGHTS = (".json", ".txt", ".model"), (".safetensors",)  # endings of files that are loaded
END_BYTES = 2**20
OURS = ("prompt", "generator", "return_dict", "latents")  # never options


class Model:
    """Where the pipeline is: `index` is its model_index.json, `facts` identify its weights."""

    def __init__(self, name: str) -> None:
        self._name, _, revision = name.partition("@")
        self._revision: str | None = None
        folder = Path(name).expanduser()
        self._folder = folder if folder.is_dir() else None
        if self._folder is not None:
            path = folder / INDEX
            if not path.is_file():
                raise UserError(f"teacher.model: {folder} is no pipeline of diffusers: it has no {INDEX}")
            self.facts = {"model": folder.resolve().name, "sha256": _digest(folder)}
        else:
            path = self._index_on_hub(name, revision or None)
            self._revision = path.parent.name  # a snapshot's folder is named by its commit
            self.facts = {"model": self._name, "revision": self._revision}
        try:
            self.index = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"teacher.model: {path} is not JSON ({error})") from None
        if not isinstance(self.index, dict):
            raise UserError(f"teacher.model: {path} is no pipeline of diffusers: it holds no JSON object")

    def _index_on_hub(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            checked_name(self._name)
        except UserError:
            raise UserError(f"teacher.model: {name!r} is neither a folder here nor OWNER/NAME[@REVISION]") from None
        with explained_reading(f"teacher.model: {name}: {INDEX}", revision):
            return Path(hf_hub_download(self._name, INDEX, revision=revision))

    def folder(self) -> Path:
        """The pipeline's files on this machine.  Raises UserError."""
        if self._folder is not None:
            return self._folder
        import diffusers

        with explained_reading(f"teacher.model: {self._name}", self._revision):
            try:
                folder = diffusers.DiffusionPipeline.download(
                    self._name, revision=self._revision, use_safetensors=True, trust_remote_code=False
                )
            except ValueError as error:
                raise UserError(f"teacher.model: {self._name} cannot be loaded: {short(error)}") from error
        return Path(folder)


def as_uint8(clip: Any) -> np.ndarray:
    """uint8 [F, H, W, 3] of PIL images, an array [F, H, W, 3] in [0, 1] or a tensor [F, 3, H, W] in [0, 1].

    Raises FailedError where a number is not finite.
    """
    if isinstance(clip, list):
        return np.stack([np.asarray(image.convert("RGB")) for image in clip])
    if not isinstance(clip, np.ndarray):
        clip = np.moveaxis(clip.float().cpu().numpy(), 1, 3)
    if clip.dtype == np.uint8:
        return clip
    if not np.isfinite(clip).all():
        raise FailedError("numbers in the video are not finite; teacher.dtype=bfloat16 or float32 has the range")
    return np.rint(clip.clip(0, 1) * 255).astype(np.uint8)


def checked_arguments(index: dict, config: LocalConfig) -> frozenset[str]:
    """The arguments that the pipeline takes.  Raises UserError where it cannot be this teacher."""
    import diffusers

    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(
            f"teacher.model: {config.model}: diffusers {diffusers.__version__} has no pipeline {name!r}, and code that "
            "comes with a model is not run. Name a model in diffusers' own format, or install a newer diffusers."
        )
    parameters = inspect.signature(found.__call__).parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "prompt")
    ]
    if "num_frames" not in parameters or "prompt" not in parameters or needed:
        wants = f"it wants {', '.join(needed)}" if needed else "it does not take a prompt and num_frames"
        raise UserError(f"teacher.model: {config.model}: {name} makes no videos from text alone: {wants}")
    for key in config.options:
        if key in OURS or key not in parameters:
            raise UserError(f"teacher.options: {name} takes no {key} from a recipe")
    for key, parameter in {"negative_prompt": "negative_prompt", "guidance": "guidance_scale"}.items():
        if parameter not in parameters and config.model_dump()[key]:
            raise UserError(f"teacher.{key}: {name} takes no {parameter}; leave it out (null)")
    return frozenset(parameters)


def open_device(name: str) -> torch.device:
    """auto: the accelerator, or else the CPU.  Raises UserError where there is no such device."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"teacher.device: {name!r} cannot be used here: {short(error)}. Use auto or cpu.") from None
    return device


def load(model: Model, config: LocalConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline, quiet and on its device.  Raises UserError."""
    import diffusers
    import torch
    import transformers

    folder = model.folder()
    # Their bars count pieces of a pipeline, and would cut through ours.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # older versions do not know `dtype`, the newer name
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        pipeline.set_progress_bar_config(disable=True)
        if config.offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise too_large(config, device, error) from None
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"teacher.model: {config.model} cannot be loaded: {short(error)}") from error
    return pipeline


def too_large(config: LocalConfig, device: torch.device, error: BaseException) -> UserError:
    """What to say and do when memory is used up."""
    return UserError(
        f"teacher.model: not enough memory on {device} ({short(error)}). Set teacher.offload=true, a smaller "
        f"teacher.batch than {config.batch}, teacher.dtype=bfloat16, or a smaller video."
    )


def open_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on an accelerator, float32 on a CPU."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def _digest(folder: Path) -> str:
    """Of what is loaded from a pipeline's folder: configs and vocabularies whole, weights by name, size and both ends.

    The first MiB of a safetensors file lists its tensors.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (*CONFIGS, *WEIGHTS) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix in WEIGHTS:
                digest.update(file.read(END_BYTES))
                file.seek(max(0, size - END_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
