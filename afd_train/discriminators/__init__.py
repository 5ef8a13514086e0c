"""Discriminators: how much a clip looks like the teacher's, given its prompt; a network a file.

To write one: a module with the members of `Discriminator`, a config section in `afd_train.discriminator_config`, a
`case` here.  It says in which space it looks at clips; objectives/pairing.py brings both sides there alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from afd_train.config import DiscriminatorConfig
from afd_train.discriminator_config import FeaturesConfig, Space, SpaceTimeConfig, VJepa2Config, VlmConfig
from afd_train.students import Student


@dataclass(frozen=True)
class Prompts:
    """What clips are judged against, one for each: words, and the student's embedding of them, [B, L, D]."""

    texts: Sequence[str]
    embeddings: Tensor

    def of(self, rows: Sequence[int]) -> Prompts:
        """Those of some clips, in this order."""
        return Prompts([self.texts[row] for row in rows], self.embeddings[list(rows)])


class Discriminator(Protocol):
    """A network that scores clips; also an `nn.Module` (`as_module`).

    space: what its clips are: `latents`, [B, F, C, h, w] of 8-bit video, or `pixels`, [B, F, 3, H, W] in [-1, 1].
    frames: of a clip that it looks at, `evenly_spaced`; None: all of them.
    """

    space: Space
    frames: int | None

    def __call__(self, clips: Tensor, prompts: Prompts, reference: Tensor | None) -> Tensor:
        """Scores, higher is more like the teacher: [B, 1], or [B, chunks] where every chunk has one.

        reference: another clip of the teacher for the same prompts, shaped as `clips`; None unless the recipe's
        section says that it looks at one.
        """
        ...


class ChunkDiscriminator(Discriminator, Protocol):
    """One whose chunk scores depend on no later chunk, and which judges many candidates for a chunk at once."""

    def score_branches(
        self, followed: Tensor, candidates: Tensor, prompts: Prompts, reference: Tensor | None
    ) -> Tensor:
        """What chunk k would score were it that of a candidate, behind the chunks before k that were followed.

        followed: [P, F, C, h, w]; candidates: [P, M, F, C, h, w]; P prompts -> [P, M, chunks].
        """
        ...


def evenly_spaced(clips: Tensor, frames: int | None) -> Tensor:
    """[B, F, ...] -> [B, frames, ...], the first and the last among them; some twice where there are fewer."""
    if frames is None or frames == clips.shape[1]:
        return clips
    rows = torch.linspace(0, clips.shape[1] - 1, frames, dtype=torch.float64).round().long()
    return clips[:, rows.to(clips.device)]


def open_discriminator(config: DiscriminatorConfig, student: Student, seed: int) -> nn.Module:
    """The discriminator that the recipe names, a `Discriminator`; new weights follow from `seed`.

    Raises UserError when the weights that it starts from cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match config:
            case SpaceTimeConfig():
                from afd_train.discriminators.spacetime import SpaceTime

                return SpaceTime(config, student.shape, student.config)
            case FeaturesConfig():
                from afd_train.discriminators.features import Features

                return Features(config, student)
            case VJepa2Config():
                from afd_train.discriminators.vjepa2 import VJepa2

                return VJepa2(config, student.config.text_dim)
            case VlmConfig():
                from afd_train.discriminators.vlm import VisionLanguage

                return VisionLanguage(config)
