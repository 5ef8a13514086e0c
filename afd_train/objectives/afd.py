"""Adversarial Flow Distillation (arXiv 2605.26105, algorithm 1), with the settings that a miniature found to work.

One step: roll out the current student on the prompts of the batch, let a prompt-paired Bradley-Terry discriminator
learn teacher from student (eq. 1), centre its scores within each prompt's group (eq. 2), and move the student's
velocity towards liked and away from disliked rollouts, all noised by the forward process (eqs. 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from afd_data.stream import Example
from afd_train.advantages import group_advantages, shuffled, weights_from_advantages
from afd_train.config import AfdConfig
from afd_train.discriminators import new_discriminator
from afd_train.flow import noised, velocity
from afd_train.losses import bradley_terry_loss, forward_process_loss, per_clip_mse, prior_loss
from afd_train.objectives import Metrics, Setup
from afd_train.policies import descend, ema_update, frozen_copy
from afd_train.rollout import Rollout
from afd_train.students import Clip
from afd_train.students.causal_wan import CausalWan, KVCache

HISTOGRAM = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)  # bins of the weights in the log
WARMUP_TAKES = 4  # rollouts of a prompt that the warm-up draws from
REFERENCE_CLIPS = 8  # rollouts a step on which the reference is evaluated: its weight is 1e-4, its cost is not


class AdversarialFlowDistillation:
    """See the module's docstring; `step` is the algorithm."""

    def __init__(self, setup: Setup, config: AfdConfig):
        self._setup = setup
        self._config = config
        self._discriminator = new_discriminator(setup.discriminator, setup.student, setup.seed).to(setup.student.device)
        self._old = frozen_copy(setup.trainee.net)
        self._reference = frozen_copy(setup.trainee.net)
        optimizer = torch.optim.AdamW(
            self._discriminator.parameters(), lr=1.0, weight_decay=setup.discriminator.weight_decay, betas=(0.5, 0.99)
        )
        self.modules = {"discriminator": self._discriminator, "old": self._old, "reference": self._reference}
        self.optimizers = {"discriminator": optimizer}

    def prepare(self, log: Callable[[int, Metrics], None]) -> None:
        """Warm the discriminator up on base rollouts, drawn once a prompt (steps -warmup_steps .. -1)."""
        config = self._setup.discriminator
        drawn: dict[str, Tensor] = {}  # prompt id -> [WARMUP_TAKES, F, C, H, W]
        for index in range(config.warmup_steps):
            step = index - config.warmup_steps
            examples = self._setup.stream.next_batch(config.warmup_prompts)
            new = [example for example in examples if example.prompt_id not in drawn]
            if new:
                clips = self._rollout(new, -1, WARMUP_TAKES).clips.unflatten(0, (len(new), WARMUP_TAKES))
                drawn |= {example.prompt_id: takes for example, takes in zip(new, clips, strict=True)}
            choice = torch.randint(WARMUP_TAKES, (len(examples),), generator=self._setup.generator(step, "warm-up"))
            clips = torch.stack([drawn[e.prompt_id][take] for e, take in zip(examples, choice.tolist(), strict=True)])
            metrics = self._update_discriminator(examples, clips, step, config.warmup_learning_rate)
            log(step, metrics | self._held_out(step))

    def step(self, examples: Sequence[Example], step: int) -> Metrics:
        """One update of the discriminator and one of the student on K rollouts of every prompt."""
        takes = self._setup.config.rollouts_per_prompt
        rollouts = self._rollout(examples, step, takes)
        metrics = self._update_discriminator(examples, rollouts.clips, step, self._setup.discriminator.learning_rate)
        with self._setup.watch("discriminator"), torch.no_grad():  # the updated one, without input noise
            teacher, student = self._scores(examples, rollouts.clips, noise=None)
        metrics |= told_apart("clean_", teacher, student)
        scores = student.unflatten(0, (len(examples), takes))
        metrics["advantage/spread"] = float(scores.std(1).mean())
        advantages = self._advantages(scores, step)
        metrics |= self._update_student(examples, rollouts, advantages, step)
        ema_update(self._old, self._setup.trainee.net, self._config.old_policy_decay)
        return metrics | self._held_out(step)

    def _rollout(self, examples: Sequence[Example], step: int, takes: int) -> Rollout:
        """`takes` rollouts of every prompt, a prompt's next to each other."""
        with self._setup.watch("rollout"):
            seed = self._setup.rollout_seed(step)
            clips = [Clip(e.prompt_id, e.prompt, seed, take) for e in examples for take in range(takes)]
            return self._setup.student.rollout(clips)

    def _text(self, examples: Sequence[Example], takes: int) -> Tensor:
        return self._setup.student.encode_text([e.prompt for e in examples]).repeat_interleave(takes, 0)

    def _update_discriminator(self, examples: Sequence[Example], rollouts: Tensor, step: int, rate: float) -> Metrics:
        """One Bradley-Terry step (eq. 1): each rollout against its prompt's teacher video."""
        setup, optimizer = self._setup, self.optimizers["discriminator"]
        with setup.watch("discriminator"):
            for group in optimizer.param_groups:
                group["lr"] = rate
            teacher, student = self._scores(examples, rollouts, setup.generator(step, "discriminator"))
            loss = bradley_terry_loss(teacher, student)
            norm = descend(setup.accelerator, optimizer, loss, setup.config.max_grad_norm)
        return {
            "discriminator/loss": float(loss.detach()),
            "discriminator/grad_norm": norm,
            **told_apart("", teacher, student),
        }

    def _scores(
        self, examples: Sequence[Example], rollouts: Tensor, noise: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of the teacher's and the student's clips, paired: [P K] each.  `noise` blurs its inputs.

        Both sides are latents of 8-bit video: the teacher's were decoded from a file, the student's make the trip.
        """
        takes = len(rollouts) // len(examples)
        clips = torch.cat([self._setup.latents(examples), self._setup.student.autoencoder.round_trip(rollouts)])
        prompt = torch.arange(len(examples))
        group = torch.cat([prompt, prompt.repeat_interleave(takes)])
        text = self._text(examples, 1)[group]
        if noise is not None:
            clips = clips + input_noise(clips, group, self._setup.discriminator.input_noise, noise)
        scores = self._discriminator(clips, text)
        return scores[: len(examples)].repeat_interleave(takes), scores[len(examples) :]

    def _advantages(self, scores: Tensor, step: int) -> Tensor:
        """Eq. 2: [P, K] -> [P, K]."""
        advantages = group_advantages(scores)
        if self._config.shuffled_advantages:
            return shuffled(advantages, self._setup.generator(step, "shuffle"))
        return advantages

    def _update_student(self, examples: Sequence[Example], rollouts: Rollout, advantages: Tensor, step: int) -> Metrics:
        """Eqs. 3 to 5 at a time of the sampler's own, the same for a whole clip."""
        setup, config = self._setup, self._config
        with setup.watch("update"):
            weight = weights_from_advantages(advantages.flatten(), config.advantage_clip)
            generator = setup.generator(step, "forward process")
            clips = rollouts.clips
            t, noise = self._forward_process(clips, generator)
            noisy, text = noised(clips, noise, t), self._text(examples, advantages.shape[1])
            v = setup.trainee.net.chunks(noisy, t, text, rollouts.cache)
            v_old = self._velocity(self._old, clips, noisy, t, text)
            some = torch.randperm(len(clips), generator=generator)[:REFERENCE_CLIPS]
            v_reference = self._velocity(self._reference, clips[some], noisy[some], t[some], text[some])
            prior = prior_loss(v[some], v_reference)
            loss = forward_process_loss(v, v_old, velocity(clips, noise), weight, config.policy_mix)
            norm = setup.trainee.update(loss + config.prior_weight * prior, step)
        bins = torch.histogram(weight.cpu(), torch.tensor(HISTOGRAM)).hist / len(weight)
        return {
            "student/loss": float(loss.detach()),
            "student/grad_norm": norm,
            "student/old_policy_deviation": float(per_clip_mse(v.detach(), v_old).mean()),
            "student/reference_distance": float(prior.detach() / v_reference.square().mean()),
            **{
                f"weight/{low:.1f}_to_{high:.1f}": float(share)
                for low, high, share in zip(HISTOGRAM, HISTOGRAM[1:], bins, strict=False)
            },
        }

    def _forward_process(self, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A time of the sampler a clip, [B, F], and noise, [B, F, C, H, W]."""
        times = torch.tensor(self._setup.student.times)
        t = times[torch.randint(len(times), (len(clips), 1), generator=generator)].expand(clips.shape[:2])
        noise = torch.randn(clips.shape, generator=generator)
        return t.to(clips.device), noise.to(clips.device)

    @staticmethod
    @torch.no_grad()
    def _velocity(net: CausalWan, clips: Tensor, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """A frozen policy's velocity on the same clean context."""
        return net.chunks(noisy, t, text, net.remember(clips[:, : -net.chunk_frames], text, KVCache()))

    @torch.no_grad()
    def _held_out(self, step: int) -> Metrics:
        """The discriminator's accuracy and margin on prompts that no training step uses."""
        setup = self._setup
        if setup.held_out is None or setup.config.held_out_per_step == 0:
            return {}
        examples = setup.held_out.next_batch(setup.config.held_out_per_step)
        teacher, student = self._scores(examples, self._rollout(examples, step, takes=1).clips, noise=None)
        return told_apart("held_out_", teacher, student)


def told_apart(which: str, teacher: Tensor, student: Tensor) -> Metrics:
    """Log entries: share of pairs in which the teacher's clip wins, and by how much on average.  Scores: [B] each."""
    return {
        f"discriminator/{which}accuracy": float((teacher > student).float().mean()),
        f"discriminator/{which}margin": float((teacher - student).detach().mean()),
    }


def input_noise(clips: Tensor, group: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Noise for the discriminator's input, [B, F, C, H, W] like `clips`.

    group: [B] integers.  The clips of a group share one standard deviation, uniform in [0, largest], so that it tells
    no side from the other.  Rollouts are scored clean: a discriminator that only ever saw one level gives all clean
    clips the same score.
    """
    level = largest * torch.rand(int(group.max()) + 1, generator=generator)[group]
    noise = torch.randn(clips.shape, generator=generator)
    return (level[:, None, None, None, None] * noise).to(clips.device)
