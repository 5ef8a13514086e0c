"""AFD by branching: a better estimator of the paper's update, for the same discriminator and the same student.

At every chunk M candidates are drawn from one cache, and a discriminator that scores chunks judges each behind the
chunks that were followed; candidate 0 is followed, so that the rollout stays on-policy.  Their advantages A are
centred over the candidates of one context and divided by the deviation of all.

For one sample s at weight w, eq. 4 in clean estimates (x the student's, q the old policy's, mix its beta) is

    w |q + mix (x - q) - s|^2 + (1 - w) |q - mix (x - q) - s|^2 = mix^2 |x - q - ((2 w - 1) / mix) (s - q)|^2 + const.

Candidates of one context that are noised all the way (t = 1) share the network's input and so x and q.  With
2 w_m - 1 = A_m / clip, which add up to 0, the mean over them is

    mix^2 |x - (q + shift / mix)|^2 + const,     shift = mean_m (A_m / clip) (s_m - mean s):

one forward pass a context instead of M, no gradient through discriminator or sampler, and the noise of M weights is
averaged before the update instead of by it.  Where the sampler has more steps, its later ones noise the candidate that
is followed, and the shift is added to what the old policy makes of that.

One shift for all that a context may become is a coarse one where many videos are right.  With `noise_spread` s below 1
candidates start from sqrt(1 - s^2) n + s n_m around the followed one's noise n, and the student learns at such a noise
too: all of the above holds, and the shift is that of the videos near the one that is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.advantages import SMALLEST_DEVIATION, clipped, shuffled
from afd_train.diversity import diversity
from afd_train.flow import clean_from_velocity, nearby_at_the_start, noised
from afd_train.losses import branch_shift, branching_loss
from afd_train.objective_config import BranchConfig
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.branching import Branches, draw_branches
from afd_train.objectives.cached import remembered, velocities
from afd_train.objectives.distances import Distances
from afd_train.objectives.flow_matching import accumulate_anchor
from afd_train.objectives.forward_process import update_purpose
from afd_train.objectives.judged import Judged
from afd_train.objectives.parts import Part, parts_of
from afd_train.objectives.warmup import held_out
from afd_train.policies import Policy, old_policy_decay
from afd_train.rollout import Sampler, step_times
from afd_train.students.causal_wan import CausalWan


@dataclass(frozen=True)
class Noisy:
    """What the student learns from, of a part's prompts: [P, F, C, h, w] but for t, scale [P, F] and text [P, L, D]."""

    x: Tensor
    t: Tensor
    shift: Tensor
    scale: Tensor
    text: Tensor
    context: Tensor


class BranchedFlowDistillation(Judged):
    """See the module's docstring; `step` is the algorithm."""

    def __init__(self, setup: Setup, config: BranchConfig):
        super().__init__(setup)
        self._config = config
        self._sampler = Sampler.of(setup.student.config, training=True)

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the discriminator and one of the student on the branches of every prompt."""
        setup = self._setup
        branches = draw_branches(setup, examples, step, self._config.noise_spread)
        metrics, _ = self.judge.meet(examples, branches.followed, step)
        scores = self.judge.score_branches(examples, branches.followed, branches.candidates, step)
        metrics["advantage/spread"] = float(scores.std(1).mean())
        metrics["student/diversity"] = diversity(branches.candidates.flatten(0, 1), branches.candidates.shape[1])
        advantages = self._advantages(examples, scores, step)
        for inner in range(self._config.inner_updates):
            metrics |= accumulate_anchor(setup, self._config, examples, step, inner)
            with setup.watch("update"):
                metrics |= self._update(examples, branches, advantages, step, inner)
        setup.trainee.follow("old", old_policy_decay(self._config, step + 1))
        return metrics | held_out(setup, self.judge, step)

    def _advantages(self, examples: Sequence[Example], scores: Tensor, step: int) -> Tensor:
        """[P, M, chunks] -> the same, adding up to 0 over M, in deviations over the branches of all processes."""
        processes, config = self._setup.processes, self._config
        centred = scores - scores.mean(1, keepdim=True)
        deviation = processes.gather(centred).square().mean().sqrt()
        advantages = clipped(centred / (deviation + SMALLEST_DEVIATION), config.advantage_clip)
        if config.shuffled_advantages:
            return shuffled(advantages, self._setup.draws(step, "shuffle", examples).uniform(scores.shape[1]))
        return advantages

    def _update(
        self, examples: Sequence[Example], branches: Branches, advantages: Tensor, step: int, inner: int
    ) -> Metrics:
        setup = self._setup
        parts = list(parts_of(len(examples), 1, setup.config.clips_per_pass))
        noisy = [self._noisy(examples, branches, advantages, part, step, inner) for part in parts]
        # What other policies say comes first, so that each takes the student's place once a step.
        old, reference = self._said("old", noisy), self._said("reference", noisy)
        total, distances = 0.0, Distances()
        for part, v_old, v_reference in zip(noisy, old, reference, strict=True):
            share = len(part.x) / len(examples)
            total += self._accumulate(part, share, v_old, v_reference, distances)
        return {"student/loss": total, "student/grad_norm": setup.trainee.step(step)} | distances.entries()

    def _accumulate(self, part: Noisy, share: float, v_old: Tensor, v_reference: Tensor, distances: Distances) -> float:
        """Add the gradient of a part, this share of the prompts; returns its share of the loss, the prior left out."""
        total, config = 0.0, self._config
        for frames, v in self._velocities(self._setup.trainee.net, part):
            piece, x, t = share * len(frames) / part.x.shape[1], part.x[:, frames], part.t[:, frames]
            clean, old_clean = (clean_from_velocity(x, velocity, t) for velocity in (v, v_old[:, frames]))
            shift, scale = part.shift[:, frames], part.scale[:, frames]
            loss = piece * branching_loss(clean, old_clean, shift, scale, config.policy_mix)
            distances.deviate(piece, v, v_old[:, frames])
            prior = distances.prior(piece, v, v_reference[:, frames])
            self._setup.trainee.accumulate(loss + config.prior_weight * prior)
            total += float(loss.detach())
        return total

    def _noisy(
        self, examples: Sequence[Example], branches: Branches, advantages: Tensor, part: Part, step: int, inner: int = 0
    ) -> Noisy:
        """The followed clips at times of the sampler (1 is noise alone), and what their candidates ask for."""
        setup, rows = self._setup, part.prompts
        some, candidates = examples[rows], branches.candidates[rows]
        chunk = setup.student.config.chunk_frames
        draws = setup.draws(step, update_purpose(inner), some)
        t = step_times(self._sampler, draws.uniform(1), candidates.shape[2], chunk)[:, 0]
        noise = draws.normal(*candidates.shape[2:])
        noise = nearby_at_the_start(branches.starts[rows], noise, t, self._config.noise_spread)
        x = noised(candidates[:, 0], noise, t)
        per_frame = advantages[rows].repeat_interleave(chunk, 2)[..., None, None, None]
        shift = branch_shift(candidates.transpose(0, 1), per_frame.transpose(0, 1), self._config.advantage_clip)
        spread = (candidates - candidates.mean(1, keepdim=True)).abs().mean((1, 3, 4, 5))  # [P, F]
        return Noisy(x, t, shift, spread.clamp_min(1e-3), setup.text(some), branches.context[rows])

    def _said(self, policy: Policy, noisy: Sequence[Noisy]) -> list[Tensor]:
        """Another policy's velocities on the same clean contexts."""
        with self._setup.trainee.acting(policy) as net:
            return [torch.cat([v for _, v in self._velocities(net, part)], 1) for part in noisy]

    def _velocities(self, net: CausalWan, part: Noisy) -> Iterator[tuple[list[int], Tensor]]:
        with self._setup.processes.unsharded(net):
            cache = remembered(self._setup, net, part.context, part.text, self._sampler.context_time)
        yield from velocities(self._setup, net, part.x, part.t, part.text, cache)
