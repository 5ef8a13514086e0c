"""Whether the discriminator's scores mean something: measured at validation steps, on held-out prompts.

`discriminator/round_trip_accuracy`: of the teacher's clips against the same ones treated as the student's are.  Above
0.5 the discriminator can tell the sides apart by what is done to them and not by what they show.
`discriminator/prompt_accuracy`: of the teacher's clips against its clips of other prompts, under one prompt.  At 0.5,
where each clip stands as often on either side, the discriminator does not read the prompt, and no student learns from
it what the prompt asks for (`discriminator.mismatch_weight`).
`discriminator/rank_correlation`: within a prompt's rollouts, of its score with object permanence, where that can be
measured exactly.  About 0.3 to 0.5 where training works; at 0 the advantages are noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from afd_data.stream import Example, Stream
from afd_train.objectives import Metrics, Setup
from afd_train.objectives.judge import Judge
from afd_train.objectives.parts import parts_of

PROMPTS = 8  # held-out prompts, over all processes at least one each
NOISE_STEP = 2**30  # of the rollouts, the same every time
TIE = 1e-4  # log odds; a smaller difference of scores says nothing


class Diagnostics:
    """Of a discriminator; nothing where no prompts are held out."""

    def __init__(self, setup: Setup, judge: Judge, exact: bool):
        """`exact`: the prompts are of the playground, whose physics can be measured."""
        self._setup, self._judge, self._exact = setup, judge, exact

    @torch.no_grad()
    def run(self) -> Metrics:
        """All processes call it and get the same; a correlation is left out where no prompt's rollouts differ."""
        setup, stream = self._setup, self._setup.held_out
        if stream is None:
            return {}
        known = self._known(stream)
        own = self._own(len(known))
        examples, clips = [known[index] for index in own], setup.latents(known)
        metrics = {"discriminator/round_trip_accuracy": self._preferred(examples, clips[own])}
        if len(known) > 1:
            others = [(index + shift) % len(known) for index in own for shift in range(1, len(known))]
            metrics["discriminator/prompt_accuracy"] = self._preferred(examples, clips[others])
        if self._exact:
            correlations = setup.processes.gather(self._correlations(examples))
            finite = correlations[correlations.isfinite()]
            if len(finite):
                metrics["discriminator/rank_correlation"] = float(finite.mean())
        return metrics

    def _preferred(self, examples: list[Example], others: Tensor) -> float:
        """How often the teacher's clips win against others of its own that went the student's way, as many each."""
        teacher, other = self._judge.score(examples, others, NOISE_STEP)
        return preferred(self._setup.processes.gather((teacher - other).mean(1)))

    @staticmethod
    def _known(stream: Stream) -> list[Example]:
        """A video of each of the first prompts."""
        first = {stream.places[key].prompt_id: key for key in reversed(stream.keys)}
        return [stream.example(first[prompt]) for prompt in sorted(first)[:PROMPTS]]

    def _own(self, count: int) -> list[int]:
        """This process's share of so many, as large on every process; some come twice where there are too few."""
        processes = self._setup.processes
        share = max(1, count // processes.count)
        return [(index * processes.count + processes.index) % count for index in range(share)]

    def _correlations(self, examples: list[Example]) -> Tensor:
        """Of each prompt's rollouts by the student: [P], nan where they do not differ."""
        setup, takes = self._setup, self._setup.config.rollouts_per_prompt
        parts = parts_of(len(examples), takes, setup.config.clips_per_pass)
        clips = torch.cat([setup.rollout(examples[p.prompts], NOISE_STEP, p.takes).clips for p in parts])
        _, student = self._judge.score(examples, clips, NOISE_STEP)
        scores = student.mean(1).unflatten(0, (len(examples), takes)).cpu()
        return rank_correlations(scores, self._permanence(examples, clips, takes))

    def _permanence(self, examples: list[Example], clips: Tensor, takes: int) -> Tensor:
        """Object permanence of the rollouts: [P, K]."""
        from afd_train.evaluation.physics import measure

        setup = self._setup
        size = setup.config.clips_per_pass or len(clips)
        videos = np.concatenate([setup.student.autoencoder.decode(part).cpu().numpy() for part in clips.split(size)])
        prompts = [example.prompt for example in examples for _ in range(takes)]
        fps = setup.student.video.fps
        values = [measure(v, fps, prompt)["object_permanence"] for v, prompt in zip(videos, prompts, strict=True)]
        return torch.tensor(values).unflatten(0, (len(examples), takes))


def preferred(gaps: Tensor) -> float:
    """Share of pairs in which the first side scores higher, a tie counting half.  gaps: [B] differences of scores."""
    return float(torch.where(gaps.abs() < TIE, 0.5, (gaps > 0).float()).mean())


def rank_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of every row: [P, K], [P, K] -> [P] in [-1, 1], nan where a row of one is constant."""
    ranks = [_ranks(values) - (values.shape[1] - 1) / 2 for values in (a.double(), b.double())]
    norms = [rank.norm(dim=1) for rank in ranks]
    correlations = (ranks[0] * ranks[1]).sum(1) / (norms[0] * norms[1])
    return correlations.where((norms[0] > 0) & (norms[1] > 0), torch.tensor(math.nan, dtype=torch.float64))


def _ranks(values: Tensor) -> Tensor:
    """From 0 within each row, equal values sharing the mean of theirs: [P, K] -> [P, K]."""
    smaller = (values[:, :, None] > values[:, None, :]).sum(2)
    equal = (values[:, :, None] == values[:, None, :]).sum(2)
    return smaller + (equal - 1) / 2
