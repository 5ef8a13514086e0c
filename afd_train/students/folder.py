"""The folder a student is kept in: `student.json` and `transformer/`, which stock diffusers opens by itself.

The student of a LoRA run has `adapter/` (a PEFT folder) instead of `transformer/`, and `student.json` names the base
that it belongs to; opening it merges the two.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import Field, ValidationError
from torch import Tensor

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.files import atomic_folder
from afd_data.section import Config
from afd_train.hub import local_path
from afd_train.presets import SIZES
from afd_train.shipped import shipped_student
from afd_train.student_config import StudentConfig
from afd_train.students import DTYPES, Student, causal_net, new_student, new_transformer
from afd_train.students.adapters import merge_adapter, write_adapter
from afd_train.students.causal_wan import cast_weights
from afd_train.students.checkpoints import heads_of, load_weights, read_weights, sizes_of, write_weights

log = logging.getLogger(__name__)

FORMAT = 1
ABOUT, TRANSFORMER, ADAPTER = "student.json", "transformer", "adapter"
# What a student's weights depend on.
NETWORK = (
    *("dim", "heads", "layers", "ffn_dim", "frequency_dim", "chunk_frames", "prediction", "coordinates"),
    *("autoencoder", "pixel_factor", "pixel_centre", "pixel_scale", "text_encoder", "text_tokens", "text_dim"),
)


class StudentFile(Config):
    """`student.json`."""

    format: int = FORMAT
    student: StudentConfig
    video: VideoConfig
    base: str | None = Field(
        default=None,
        description="what adapter/ belongs to: a student folder (relative to this one, absolute, or one that afd "
        "ships, such as `miniature/one-step`), a file or folder of weights, or hf://...",
    )


def save_student(
    student: Student, folder: Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a student folder; complete or not there at all.  `dtype` rounds the weights (bf16 halves the file).

    state: the transformer's weights under stock names, where they are not the network's own (sharded, adapted).
    """
    about = StudentFile(student=student.config, video=student.video)
    with atomic_folder(folder) as part:
        write_transformer(student, part / TRANSFORMER, dtype, state)
        (part / ABOUT).write_text(about.model_dump_json(indent=1), encoding="utf-8")


def write_transformer(
    student: Student, folder: Path, dtype: torch.dtype | None = None, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the folder that stock `WanTransformer3DModel.from_pretrained` opens; `state` as in save_student."""
    transformer = student.net.transformer
    weights = transformer.state_dict() if state is None else state
    assert not any(".lora_" in name for name in weights), "adapters are saved by save_adapter"
    state = {name: value.to("cpu", dtype or value.dtype) for name, value in weights.items()}
    stock = {"_class_name": WanTransformer3DModel.__name__}  # which FSDP renames
    config = json.loads(transformer.to_json_string()) | stock
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(state, folder)


def save_adapter(
    folder: Path,
    student: Student,
    base: str,
    adapter_state: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    targets: list[str],
) -> None:
    """Write the folder of a student that is `base` plus adapters; complete or not there at all.

    base: as in StudentFile.  adapter_state: as `peft.get_peft_model_state_dict(transformer, ...)` returns it.
    targets: the `target_modules` of its LoraConfig.
    """
    about = StudentFile(student=student.config, video=student.video, base=base)
    with atomic_folder(folder) as part:
        known = base if base.startswith("hf://") else None  # no other name means anything on another machine
        write_adapter(part / ADAPTER, adapter_state, rank, alpha, targets, known)
        (part / ABOUT).write_text(about.model_dump_json(indent=1), encoding="utf-8")


def open_student(folder: Path | str) -> Student:
    """Read a student folder (or hf://..., or the name of one that afd ships).  On the CPU, in evaluation mode.

    Weights come in the precision of its configuration, adapters merged.  Raises UserError when the folder, its JSON or
    its weights are not a student's.
    """
    # A path is one, also that of a run's own folder `base`.
    folder = (shipped_student(folder) if isinstance(folder, str) else None) or local_path(folder, "student")
    about = read_about(folder)
    student = Student(causal_net(_opened(folder, about, about.student), about.student), about.student, about.video)
    student.net.eval()
    return student


def starting_student(config: StudentConfig, video: VideoConfig, seed: int, init: str | None) -> Student:
    """The student a training starts from: random weights of `seed`, or those of `init`; sampled as `config` says.

    init: a student folder, the name of one that afd ships, or whatever `read_weights` takes; the network is the one of
    `config`, in its precision.
    Raises UserError that says which keys of the recipe do not agree with the weights.
    """
    if init is None:
        return new_student(config, video, seed)
    path = shipped_student(init) or local_path(init, "student.init")
    if (path / ABOUT).is_file():
        about = read_about(path)
        _same_network(about.student, config, f"student.init: {init}")
        sizes = [(shape.width, shape.height, shape.frames) for shape in (about.video, video)]
        if sizes[0] != sizes[1]:
            log.warning(f"student.init: {init} was made for clips of another size")
        transformer = _opened(path, about, config)
    else:
        weights = read_weights(path, config.init_key, "student.init")
        transformer = _filled(config, weights, f"student.init: {init}", heads_of(path))
    student = Student(causal_net(transformer, config), config, video)
    student.net.train()
    return student


def read_about(folder: Path) -> StudentFile:
    """`student.json` of a student folder.  Raises UserError."""
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{folder}: no student here (student.json is missing). Name a folder that `afd train` wrote.")
    try:
        about = StudentFile.model_validate_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a student's description: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(f"{path}: not a student's description: {where}: {first['msg']}") from None
    if about.format != FORMAT:
        raise UserError(f"{path}: format {about.format}, this afd reads {FORMAT}")
    return about


def _opened(
    folder: Path, about: StudentFile, config: StudentConfig, above: tuple[Path, ...] = ()
) -> WanTransformer3DModel:
    """The transformer of a student folder in the precision of `config`; `above`: folders whose base it is."""
    if about.base is None:
        weights = read_weights(folder / TRANSFORMER, None, "student")
        return _filled(config, weights, f"{folder}: {TRANSFORMER}/")
    where = f"{folder / ABOUT}: base {about.base}"
    base = _base_path(folder, about.base, where)
    if base.resolve() in (*above, folder.resolve()):
        raise UserError(f"{where}: is the base of itself")
    if (base / ABOUT).is_file():
        below = read_about(base)
        _same_network(below.student, config, where)
        transformer = _opened(base, below, config, (*above, folder.resolve()))
    else:
        transformer = _filled(config, read_weights(base, config.init_key, where), where)
    merge_adapter(transformer, folder / ADAPTER)
    return transformer


def _base_path(folder: Path, base: str, where: str) -> Path:
    if shipped := shipped_student(base):
        return shipped
    path = local_path(base, where) if base.startswith("hf://") else folder / base
    if not path.exists():
        raise UserError(f"{where}: not there. Bring it there too, or open the student where it was trained.")
    return path


def _filled(
    config: StudentConfig, weights: Mapping[str, Tensor], where: str, stated: Mapping[str, int] | None = None
) -> WanTransformer3DModel:
    """The transformer of `config` with these weights, in the precision of `config`, which no file backs any more.

    stated: sizes that are told beside the weights.  Raises UserError where they do not fit.
    """
    _same_sizes(sizes_of(weights) | dict(stated or {}), config, where)  # before anything of a wrong size is made
    with torch.device("meta"):
        transformer = new_transformer(config)
    load_weights(transformer, weights, where)
    cast_weights(transformer, DTYPES[config.dtype])
    for parameter in transformer.parameters():
        # What was read is a view of the file, whose owner may write another one in its place while we train.
        parameter.data = parameter.data.contiguous().clone()
    return transformer


def _same_network(found: StudentConfig, config: StudentConfig, where: str) -> None:
    for key in NETWORK:
        has, wanted = (getattr(each, key) for each in (found, config))
        if key == "frequency_dim":
            has, wanted = has or found.dim, wanted or config.dim
        if has != wanted:
            raise UserError(f"{where} has {key} {has}, the recipe has {wanted}. Set student.{key} as in its {ABOUT}.")


def _same_sizes(has: Mapping[str, int], config: StudentConfig, where: str) -> None:
    """Raise UserError that says which keys of the student's section describe another network."""
    channels = config.latent_channels
    inside = {
        "dim": config.dim,
        "heads": config.heads,
        "layers": config.layers,
        "ffn_dim": config.ffn_dim,
        "text_dim": config.text_dim,
        "frequency_dim": config.frequency_dim or config.dim,
    }
    around = {"channels_in": channels + 2 * config.coordinates, "channels_out": channels}
    wrong = [key for key, wanted in (inside | around).items() if has.get(key, wanted) != wanted]
    if not wrong:
        return
    advice = [f"student.{key}={has[key]}" for key in wrong if key in inside]
    if "dim" in wrong and "heads" not in has:
        advice.append(f"student.heads (weights do not show it; {has['dim'] // 128} in Wan, whose heads are 128 wide)")
    if any(key in around for key in wrong):
        advice.append("student.autoencoder, student.pixel_factor and student.coordinates, which give the channels")
    size = [name for name, given in SIZES.items() if all(has.get(key, given[key]) == given[key] for key in inside)]
    if size and wrong[0] in inside:
        advice = [f"student.size={size[0]} and leave these keys out"]
    listing = ", ".join(f"{key} {has[key]} (the recipe: {(inside | around)[key]})" for key in wrong)
    raise UserError(f"{where} has {listing}. Set {', '.join(advice)}.")
