"""The student's update (eqs. 3 to 5): its own clips, noised, and the velocity moved towards or away from them.

All forms give the same gradient where they claim to: at once or in parts (`train.clips_per_pass`), whole clips or
chunk by chunk (`train.chunk_by_chunk`).  `context_gradient` is another one: teacher forcing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.flow import nearby_at_the_start, noised, velocity
from afd_train.losses import forward_process_loss
from afd_train.objective_config import AfdConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.cached import remembered, velocities
from afd_train.objectives.distances import Distances
from afd_train.objectives.flow_matching import SMALLEST_TIME, accumulate_anchor
from afd_train.objectives.parts import Part, parts_of
from afd_train.policies import Policy
from afd_train.rollout import Sampler, step_times
from afd_train.students.attention import KVCache
from afd_train.students.causal_wan import CausalWan


@dataclass(frozen=True)
class Step:
    """K rollouts of every prompt of a step, by prompt, then take.

    clips, starts: [P K, F, C, H, W], the latter the noise that every chunk began as; context: what the student
    remembered of them, [P K, F - chunk, C, H, W]; cache: its keys and values where all clips were drawn at once.
    """

    number: int
    examples: Sequence[Example]
    takes: int
    clips: Tensor
    starts: Tensor
    context: Tensor
    cache: KVCache | None

    @staticmethod
    def drawn(setup: Setup, examples: Sequence[Example], step: int) -> Step:
        """Roll out the current student."""
        takes = setup.config.rollouts_per_prompt
        parts = list(parts_of(len(examples), takes, setup.config.clips_per_pass))
        clips, starts, context, cache = [], [], [], None
        for part in parts:
            drawn = setup.rollout(examples[part.prompts], step, part.takes)
            clips.append(drawn.clips)
            starts.append(torch.cat([visited[0] for visited in drawn.visited], 1))
            context.append(drawn.context)
            cache = drawn.cache if len(parts) == 1 else None
            del drawn  # a second cache would not fit beside it
        return Step(step, examples, takes, torch.cat(clips), torch.cat(starts), torch.cat(context), cache)


@dataclass(frozen=True)
class Noisy:
    """Clips of a part, each noised n times; the versions stand one after the other along the frames.

    x, target: [B, n F, C, H, W]; t: [B, n F]; text: [P, L, D].
    """

    x: Tensor
    t: Tensor
    target: Tensor
    text: Tensor

    def rows(self, rows: Sequence[int]) -> Noisy:
        """Some of the clips, each with a text of its own."""
        takes = len(self.x) // len(self.text)
        return Noisy(self.x[rows], self.t[rows], self.target[rows], self.text[[row // takes for row in rows]])


@dataclass(frozen=True)
class Asked:
    """A part's clips with what the other policies say of them: all of them the old one, these `rows` the reference."""

    noisy: Noisy
    v_old: Tensor
    rows: list[int]
    v_reference: Tensor | None


class ForwardProcess:
    """One update of the student on weighted rollouts."""

    def __init__(self, setup: Setup, config: AfdConfig):
        self._setup = setup
        self._config = config
        self._sampler = Sampler.of(setup.student.config, training=True)

    def update(self, drawn: Step, weight: Tensor) -> Metrics:
        """`inner_updates` steps of the student.  weight: [P K, S] in [0, 1], S = 1 or the number of chunks."""
        weight = weight.repeat_interleave(drawn.clips.shape[1] // weight.shape[1], 1)
        metrics: Metrics = {}
        for inner in range(self._config.inner_updates):
            metrics |= accumulate_anchor(self._setup, self._config, drawn.examples, drawn.number, inner)
            with self._setup.watch("update"):
                metrics |= self._update(drawn, weight, inner)
            drawn = replace(drawn, cache=None)  # its keys and values were those of the student before
        return metrics

    def _update(self, drawn: Step, weight: Tensor, inner: int) -> Metrics:
        """weight: [P K, F]; every inner update has times and noises of its own, and the rollout's clean context."""
        parts = list(parts_of(len(drawn.examples), drawn.takes, self._setup.config.clips_per_pass))
        noisy = [self._noisy(drawn, part, inner) for part in parts]
        contexts = [drawn.context[part.rows] for part in parts]
        rows = [self._compared(drawn, part) for part in parts]
        # What other policies say comes first, so that each takes the student's place once a step.
        v_old = self._frozen("old", noisy, contexts)
        some = [index for index in range(len(parts)) if rows[index]]
        said = self._frozen(
            "reference", [noisy[i].rows(rows[i]) for i in some], [contexts[i][rows[i]] for i in some]
        )  # fmt: skip
        v_reference = dict(zip(some, said, strict=True))
        total, distances = 0.0, Distances()
        for index, part in enumerate(parts):
            asked = Asked(noisy[index], v_old[index], rows[index], v_reference.get(index))
            total += self._accumulate(drawn, part, asked, weight[part.rows], distances)
        norm = self._setup.trainee.step(drawn.number)
        return {"student/loss": total, "student/grad_norm": norm} | distances.entries()

    @staticmethod
    def _compared(drawn: Step, part: Part) -> list[int]:
        """Rows of a part that are compared with the reference: one clip a prompt, the same take on every process.

        The prior's weight is 1e-4, and its cost is not.
        """
        take, group = drawn.number % drawn.takes - part.takes.start, len(part.takes)
        clips = part.rows.stop - part.rows.start
        return list(range(take, clips, group)) if 0 <= take < group else []

    def _accumulate(self, drawn: Step, part: Part, asked: Asked, weight: Tensor, distances: Distances) -> float:
        """Add the gradient of a part of the clips; returns its share of the loss that is logged, the prior left out."""
        noisy, rows = asked.noisy, asked.rows
        clips, context = drawn.clips[part.rows], drawn.context[part.rows]
        weight = weight.repeat(1, self._config.noisings_per_clip)
        share, of_prompts = len(clips) / len(drawn.clips), len(rows) / len(drawn.examples)
        total = 0.0
        for frames, v in self._student(noisy, clips, context, drawn.cache):
            size, v_old = len(frames) / noisy.x.shape[1], asked.v_old[:, frames]
            loss = forward_process_loss(
                v,
                v_old,
                noisy.target[:, frames],
                weight[:, frames],
                self._config.policy_mix,
                self._config.adaptive_weight,
            )
            loss = share * size * loss
            total += float(loss.detach())
            distances.deviate(share * size, v, v_old)
            if asked.v_reference is not None:
                prior = distances.prior(of_prompts * size, v[rows], asked.v_reference[:, frames])
                loss = loss + self._config.prior_weight * prior
            self._setup.trainee.accumulate(loss)
        return total

    def _noisy(self, drawn: Step, part: Part, inner: int) -> Noisy:
        """Eq. 3."""
        examples, clips, copies = drawn.examples[part.prompts], drawn.clips[part.rows], self._config.noisings_per_clip
        draws = self._setup.draws(drawn.number, update_purpose(inner), examples, part.takes)
        t = self._times(draws.uniform(copies), clips.shape[1]).flatten(1)
        noise = draws.normal(copies * clips.shape[1], *clips.shape[2:])
        starts = drawn.starts[part.rows].repeat(1, copies, 1, 1, 1)
        noise = nearby_at_the_start(starts, noise, t, self._config.noise_spread)
        clean = clips.repeat(1, copies, 1, 1, 1)
        return Noisy(noised(clean, noise, t), t, velocity(clean, noise), self._setup.text(examples))

    def _times(self, where: Tensor, frames: int) -> Tensor:
        """Places in [0, 1), [B, copies] -> times [B, copies, F]: the same place for a whole clip.

        Of the student's own sampler by default, the first chunk's and the others'.
        """
        match self._config.times:
            case "range":
                low, high = self._config.time_range
            case "uniform":
                low, high = SMALLEST_TIME, 1.0
            case "sampler":
                return step_times(self._sampler, where, frames, self._setup.student.config.chunk_frames)
        return (high - (high - low) * where)[:, :, None].expand(-1, -1, frames)

    def _frozen(self, policy: Policy, noisy: Sequence[Noisy], contexts: Sequence[Tensor]) -> list[Tensor]:
        """Another policy's velocities on the same clean contexts: [B, n F, C, H, W] each."""
        setup, found = self._setup, []
        with setup.trainee.acting(policy) as net, setup.processes.unsharded(net):
            for part, context in zip(noisy, contexts, strict=True):
                v = torch.empty_like(part.x)
                cache = remembered(setup, net, context, part.text, self._sampler.context_time)
                for frames, piece in self._velocities(net, part, cache):
                    v[:, frames] = piece
                found.append(v)
        return found

    def _student(
        self, noisy: Noisy, clips: Tensor, context: Tensor, cache: KVCache | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """The student's velocity with gradient, and the frames of `noisy` that it is for, piece by piece."""
        net = self._setup.trainee.net
        if self._config.context_gradient:
            clean = torch.cat([context, clips[:, context.shape[1] :]], 1)
            clean_t = torch.full(clean.shape[:2], self._sampler.context_time, device=clean.device)
            yield list(range(noisy.x.shape[1])), net(noisy.x, noisy.t, noisy.text, clean, clean_t)
            return
        if cache is None:
            with self._setup.processes.unsharded(net):
                cache = remembered(self._setup, net, context, noisy.text, self._sampler.context_time)
        yield from self._velocities(net, noisy, cache)

    def _velocities(self, net: CausalWan, noisy: Noisy, cache: KVCache) -> Iterator[tuple[list[int], Tensor]]:
        copies = self._config.noisings_per_clip
        return velocities(self._setup, net, noisy.x, noisy.t, noisy.text, cache, copies)


def update_purpose(inner: int) -> str:
    """What the randomness of a step's update is drawn for."""
    return "forward process" if inner == 0 else f"forward process {inner}"
