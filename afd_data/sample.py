"""THE on-disk contract of a sample: member names, the fixed JSON schema, the key alphabet.

A sample is `KEY.mp4` + `KEY.json` in a tar.  Readers of the ecosystem infer features from the first few samples and
silently drop or zero what deviates later, so the members and the JSON keys never vary, a float is always a float, and
whatever is free-form travels as one JSON *string*.  The time stands in the tar header's mtime, so that for a free
teacher the same request gives the same bytes; what a provider tells of its job (id, time, cost) is that job's alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from afd_data.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA_VERSION = 1
MEMBERS = ("mp4", "json")
SPLITS = ("train", "validation", "test")
KEY = re.compile(r"[a-z0-9_-]{1,120}")
SHA256 = re.compile(r"[0-9a-f]{64}")
DISTILLATION = ("allowed", "disallowed", "unknown")


@dataclass(frozen=True)
class Sample:
    """The JSON member.  Fields are in file order; `*_json` are free-form objects encoded as strings."""

    schema_version: int
    key: str  # prompt id and take
    prompt_id: str
    prompt: str
    split: str
    take: int
    generation: int  # refresh round
    fingerprint: str  # of the request
    seed: int
    teacher: str
    teacher_version: str
    requested_json: str  # settings asked for
    effective_json: str  # settings the teacher says it used
    provenance_json: str  # source file, job id, revised prompt, ...
    world_json: str  # exact state of a simulated world, "{}" elsewhere
    licence: str
    distillation: str  # allowed | disallowed | unknown
    cost: float
    currency: str
    width: int
    height: int
    frames: int
    fps: float
    duration_s: float
    video_sha256: str
    perceptual_hash: str  # 16 hex digits

    def to_json(self) -> bytes:
        """The member's bytes: compact, key order as declared, UTF-8."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")).encode()


def sample_key(prompt_id: str, take: int) -> str:
    """The name of a sample inside tars: `[a-z0-9_-]` only, since WebDataset cuts names at the first dot."""
    key = f"{prompt_id}-{take:02d}"
    assert KEY.fullmatch(key), key
    return key


def parse_sample(data: bytes, where: str) -> Sample:
    """Read a JSON member that a stranger may have written.

    Raises UserError naming `where` when the schema version, the set of keys, a type, the key or a fixed word is off.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an integer of 5000 digits
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema version {record.get('schema_version')!r}, this afd reads {SCHEMA_VERSION}. "
            "Use the afd that wrote the cache, or cache again into a new folder."
        )
    if odd := sorted(record.keys() ^ {field.name for field in fields(Sample)}):
        raise UserError(f"{where}: keys missing or unknown: {', '.join(map(str, odd[:5]))}")
    sample = Sample(**record)
    try:
        check_types(sample)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None
    if not KEY.fullmatch(sample.key) or sample.split not in SPLITS:
        raise UserError(f"{where}: bad key {sample.key!r} or split {sample.split!r}")
    _check_storable(sample, where)
    if not KEY.fullmatch(sample.prompt_id) or sample.key != f"{sample.prompt_id}-{sample.take:02d}":
        raise UserError(f"{where}: key {sample.key!r} is not of take {sample.take} of prompt {sample.prompt_id!r}")
    if sample.distillation not in DISTILLATION:
        raise UserError(f"{where}: distillation is {sample.distillation!r}, not {', '.join(DISTILLATION)}")
    return sample


def check_types(record: DataclassInstance) -> None:
    """Raises TypeError when a field declared int, str or float holds anything else; other fields are not checked."""
    for field in fields(record):
        found = type(getattr(record, field.name)).__name__
        if field.type in ("int", "str", "float") and found != field.type:
            raise TypeError(f"{field.name} is {found}, expected {field.type}")


def _check_storable(sample: Sample, where: str) -> None:
    """Raises UserError for what JSON can say and the index cannot hold."""
    for name, value in vars(sample).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: {name} is an integer of more than 64 bits")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UserError(f"{where}: half a character (a lone surrogate) in {name}") from None
