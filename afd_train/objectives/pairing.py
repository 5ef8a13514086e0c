"""Clips of teacher and student before the discriminator, in its space and as pairs of one prompt.

Both sides go the same way there.  Latents are those of 8-bit video: the teacher's were decoded from a file, the
student's make the same trip (`Autoencoder.round_trip`).  Pixels are decoded from latents, for the teacher too, whose
clips the autoencoder has then seen as often as the student's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_data.stream import Example, Stream
from afd_train.discriminators import ChunkDiscriminator, Prompts, evenly_spaced
from afd_train.draws import Draws
from afd_train.objectives import Setup
from afd_train.objectives.parts import Part, parts_of

Sides = dict[str, Tensor]  # teacher, student, mismatched, moved: [n, F, C, h, w] each


@dataclass(frozen=True)
class Pairs:
    """Scores of a part's clips, [n, S] each, S = 1 or chunks; rows i of all are of one prompt.

    `mismatched`: the teacher's clips of other prompts, `moved`: its clips again, a small random step away, where the
    loss asks for them; `drawn`: the student's clips as they were judged, [n, F, C, h, w], where the gradient with
    respect to them is asked for.
    """

    teacher: Tensor
    student: Tensor
    takes: int
    mismatched: Tensor | None = None
    moved: Tensor | None = None
    drawn: Tensor | None = None


class Pairing:
    """Scores by a discriminator, part by part of a step."""

    def __init__(self, setup: Setup, net: nn.Module):
        self._setup, self._config, self._net = setup, setup.discriminator, net

    def pairs(
        self, examples: Sequence[Example], rollouts: Tensor, step: int, noisy: bool, followed: bool = False
    ) -> Iterator[Pairs]:
        """Scores of teacher and student, paired, part by part; with the input noise of `step` where it is asked for.

        followed: the student's scores carry gradient to `Pairs.drawn`.
        """
        setup, takes = self._setup, len(rollouts) // len(examples)
        teacher, text = setup.latents(examples), setup.text(examples)
        reference = self._reference(examples, step)
        others = (
            setup.latents(self._of_other_prompts(examples, step)) if noisy and self._config.mismatch_weight else None
        )
        for part in parts_of(len(examples), takes, setup.config.clips_per_pass):
            some, count = examples[part.prompts], len(part.takes)
            drawn = self._own_space(rollouts[part.rows], True).detach().requires_grad_(followed)
            sides = {"teacher": self._own_space(teacher[part.prompts]), "student": drawn}
            if others is not None:
                sides["mismatched"] = self._own_space(others[part.prompts])
            if noisy:
                sides = self._noisy(sides, some, part, step)
            group = by_prompt(sides, len(some))
            prompts = Prompts([example.prompt for example in some], text[part.prompts]).of(group)
            beside = None if reference is None else self._own_space(reference[part.prompts])[group]
            scores = self._net(torch.cat(list(sides.values())), prompts, beside)
            found = split(scores, sides)
            student = found.pop("student")
            each = {side: of_prompts.repeat_interleave(count, 0) for side, of_prompts in found.items()}
            yield Pairs(student=student, takes=count, drawn=drawn if followed else None, **each)

    def _noisy(self, sides: Sides, examples: Sequence[Example], part: Part, step: int) -> Sides:
        """All clips under their prompt's level of noise and, for R1, the teacher's a random step away from there."""
        setup, config = self._setup, self._config
        clips, group = torch.cat(list(sides.values())), torch.tensor(by_prompt(sides, len(examples)))
        takes = {side: part.takes if side == "student" else range(1) for side in sides}
        noises = [setup.draws(step, side, examples, takes[side]) for side in sides]
        levels = setup.draws(step, "noise level", examples)
        noisy = clips + input_noise(clips.shape, group, config.input_noise, levels, noises)
        found = split(noisy, sides)
        if config.r1_weight:
            direction = setup.draws(step, "finite difference", examples).normal(*clips.shape[1:])
            found["moved"] = found["teacher"] + config.r1_step * direction
        return found

    def branches(self, examples: Sequence[Example], followed: Tensor, candidates: Tensor, step: int) -> Tensor:
        """Scores of the candidates for every chunk, behind the followed chunks before it: [P, M, chunks].

        followed: [P, F, C, h, w]; candidates: [P, M, F, C, h, w].
        """
        setup, net, found = self._setup, cast(ChunkDiscriminator, self._net), []
        text, reference = setup.text(examples), self._reference(examples, step)
        for part in parts_of(len(examples), 1, setup.config.clips_per_pass):
            rows = part.prompts
            prompts = Prompts([example.prompt for example in examples[rows]], text[rows])
            beside = None if reference is None else self._own_space(reference[rows])
            branches = self._own_space(candidates[rows].flatten(0, 1), True).unflatten(0, candidates[rows].shape[:2])
            found.append(net.score_branches(self._own_space(followed[rows], True), branches, prompts, beside))
        return torch.cat(found)

    def _reference(self, examples: Sequence[Example], step: int) -> Tensor | None:
        """Another clip of the teacher for each example, where the discriminator looks at one."""
        return self._setup.latents(self._other_takes(examples, step)) if self._config.references else None

    def _own_space(self, latents: Tensor, drawn: bool = False) -> Tensor:
        """Clips in the discriminator's space; `drawn`: by the student, so that they have seen no 8-bit video yet."""
        autoencoder = self._setup.student.autoencoder
        if self._net.space == "latents":
            return autoencoder.round_trip(latents) if drawn else latents
        # In 8 bits as long as there are all frames of them, the most that a step has of anything.
        pixels = evenly_spaced(autoencoder.decode(latents), self._net.frames)  # pyright: ignore[reportArgumentType]
        return pixels.permute(0, 1, 4, 2, 3).float() / 127.5 - 1

    def _other_takes(self, examples: Sequence[Example], step: int) -> list[Example]:
        """For each example another take of its prompt.  Raises UserError where there is none."""
        found = []
        draws = self._setup.draws(step, "reference", examples).uniform().tolist()
        for example, draw in zip(examples, draws, strict=True):
            stream = self._stream_of(example)
            others = [key for key in stream.takes(example.prompt_id) if key != example.key]
            if not others:
                raise UserError(
                    f"discriminator.reference: prompt {example.prompt!r} has one video only, and a second take is to "
                    "stand beside it. Cache more (cache.takes and cache.eval_takes >= 2), or set it to false."
                )
            found.append(stream.example(others[int(draw * len(others))]))
        return found

    def _of_other_prompts(self, examples: Sequence[Example], step: int) -> list[Example]:
        """For each example one of another prompt of its split."""
        found = []
        draws = self._setup.draws(step, "other prompt", examples).uniform().tolist()
        stream = self._stream_of(examples[0])  # a step's examples are of one split
        keys = stream.keys
        for example, draw in zip(examples, draws, strict=True):
            others = [key for key in keys if stream.places[key].prompt_id != example.prompt_id]
            found.append(stream.example(others[int(draw * len(others))]))
        return found

    def _stream_of(self, example: Example) -> Stream:
        held_out = self._setup.held_out
        return held_out if held_out is not None and example.split == held_out.split else self._setup.stream


def split(joined: Tensor, sides: Sides) -> Sides:
    """What stands one after the other in `joined`, [B, ...], for each clip of these sides."""
    return dict(zip(sides, joined.split([len(clips) for clips in sides.values()]), strict=True))


def by_prompt(sides: Sides, prompts: int) -> list[int]:
    """Which prompt each clip of these sides, one after the other, is of; a side has as many of each."""
    return [prompt for clips in sides.values() for prompt in range(prompts) for _ in range(len(clips) // prompts)]


def input_noise(shape: Sequence[int], group: Tensor, largest: float, levels: Draws, noises: Sequence[Draws]) -> Tensor:
    """Noise for the discriminator's input: [B, F, C, H, W], drawn by `noises` in the order of the clips.

    group: [B] integers.  The clips of a group share one standard deviation, uniform in [0, largest], so that it tells
    no side from the other.  Rollouts are scored clean: a discriminator that only ever saw one level gives all clean
    clips the same score.
    """
    level = largest * levels.uniform()[group]
    noise = torch.cat([draws.normal(*shape[1:]) for draws in noises])
    return level[:, None, None, None, None] * noise
