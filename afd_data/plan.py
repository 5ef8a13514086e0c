"""Recipe + prompts -> the samples of a cache, each with its key, seed and request fingerprint.

A *fingerprint* identifies a request on every machine and for ever: whatever would change the video is hashed into it.
A *key* names a sample (prompt id and take); a *generation* numbers refresh rounds (0 is the first).
Pure functions: nothing is asked and nothing is written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from afd_data.config import DataConfig, VideoConfig
from afd_data.prompts import Prompt
from afd_data.sample import sample_key
from afd_data.teachers import Identity, Request


@dataclass(frozen=True)
class Planned:
    """One sample that a recipe asks for."""

    key: str
    generation: int
    split: str
    prompt_id: str
    prompt: str
    take: int
    seed: int
    fingerprint: str

    def request(self, video: VideoConfig) -> Request:
        """What the teacher is asked."""
        return Request(self.fingerprint, self.prompt_id, self.prompt, self.take, self.seed, video)


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces.  Raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def request_seed(recipe_seed: int, prompt_id: str, take: int, generation: int = 0) -> int:
    """Seed of a request, in [0, 2**31): a function of its arguments and of nothing else."""
    digest = hashlib.sha256(f"{recipe_seed}/{prompt_id}/{take}/{generation}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**31


def recipe_facts(recipe: DataConfig, identity: Identity) -> dict:
    """What all fingerprints of a cache share: another value anywhere in it means other videos."""
    return {
        "teacher": identity.name,
        "teacher_version": identity.version,
        "settings": identity.settings,
        "video": recipe.video.model_dump(),
        "seed": recipe.seed,
    }


def fingerprint(prompt: str, identity: Identity, video: VideoConfig, seed: int, take: int, generation: int = 0) -> str:
    """sha256 (64 hex digits) over everything that would change the video.

    The first round leaves its generation out, so that a later afd can add rounds without renaming what exists.
    """
    request = {
        "prompt": prompt,
        "teacher": {"name": identity.name, "version": identity.version, "settings": identity.settings},
        "video": video.model_dump(),
        "seed": seed,
        "take": take,
    }
    if generation > 0:
        request["generation"] = generation
    return hashlib.sha256(canonical_json(request).encode()).hexdigest()


def plan_samples(
    recipe: DataConfig, prompts: Iterable[Prompt], identity: Identity, generation: int = 0
) -> Iterator[Planned]:
    """All samples of a recipe, in the order of the prompts; several takes of a prompt stand together."""
    for prompt in prompts:
        takes = recipe.cache.takes if prompt.split == "train" else recipe.cache.eval_takes
        for take in range(takes):
            seed = request_seed(recipe.seed, prompt.id, take, generation)
            yield Planned(
                key=sample_key(prompt.id, take),
                generation=generation,
                split=prompt.split,
                prompt_id=prompt.id,
                prompt=prompt.text,
                take=take,
                seed=seed,
                fingerprint=fingerprint(prompt.text, identity, recipe.video, seed, take, generation),
            )
