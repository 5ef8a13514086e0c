"""What is written down of a video: its `Sample` where it was taken, else the reason."""

from __future__ import annotations

import hashlib
from pathlib import Path

from afd_data.config import VideoConfig
from afd_data.plan import Planned, canonical_json
from afd_data.sample import SCHEMA_VERSION, Sample
from afd_data.teachers import Delivery, Identity


def sample_of(
    planned: Planned,
    delivery: Delivery,
    cost: float,
    identity: Identity,
    video: VideoConfig,
    mp4: bytes,
    perceptual_hash: str,
) -> Sample:
    """The record of `mp4`, which is as `video` asks.  cost: in the identity's currency."""
    terms = {"terms_url": identity.terms_url} if identity.terms_url else {}
    return Sample(
        schema_version=SCHEMA_VERSION,
        key=planned.key,
        prompt_id=planned.prompt_id,
        prompt=planned.prompt,
        split=planned.split,
        take=planned.take,
        generation=planned.generation,
        fingerprint=planned.fingerprint,
        seed=planned.seed,
        teacher=identity.name,
        teacher_version=identity.version,
        requested_json=canonical_json({"settings": identity.settings, "video": video.model_dump()}),
        effective_json=canonical_json(delivery.effective),
        provenance_json=canonical_json(delivery.provenance | terms),
        world_json=canonical_json(delivery.world),
        licence=identity.licence,
        distillation=identity.distillation,
        cost=cost,
        currency=identity.currency,
        width=video.width,
        height=video.height,
        frames=video.frames,
        fps=float(video.fps),
        duration_s=video.frames / video.fps,
        video_sha256=hashlib.sha256(mp4).hexdigest(),
        perceptual_hash=perceptual_hash,
    )


def reason_of(word: str, error: Exception, folder: Path) -> str:
    """One line that does not say where `folder`, the spool, lies: the journal may travel.  word: "" for none."""
    text = " ".join(str(error).replace(f"{folder}/", "").split()) or type(error).__name__
    return f"{word}: {text}" if word else text
