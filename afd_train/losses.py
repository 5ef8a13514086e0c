"""Losses as pure functions of tensors: no config, no model, no logging.

Equation numbers are those of the AFD paper (arXiv 2605.26105).  Clips are [B, F, C, H, W], scores and weights [B].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_clip_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each clip.  a, b: [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)


def per_frame_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each frame.  a, b: [B, F, ...] -> [B, F]."""
    return (a - b).square().flatten(2).mean(2)


def bradley_terry_loss(teacher_score: Tensor, student_score: Tensor, weight: Tensor | None = None) -> Tensor:
    """-log P(the teacher's clip beats the student's) under Bradley-Terry (eq. 1).

    teacher_score, student_score: [B], paired by prompt; weight: [B], of each pair -> scalar.  Equal scores give ln 2.
    At the optimum a score is the log density ratio of teacher to student (eq. 10), which is what makes it a usable
    advantage.
    """
    return _weighted(F.softplus(student_score - teacher_score), weight)


def chunk_bradley_terry_loss(teacher_score: Tensor, student_score: Tensor, weight: Tensor | None = None) -> Tensor:
    """`bradley_terry_loss` of every chunk, averaged over chunks.  Scores: [B, chunks]; weight: [B] -> scalar."""
    return _weighted(F.softplus(student_score - teacher_score).mean(1), weight)


def logistic_loss(teacher_score: Tensor, student_score: Tensor, weight: Tensor | None = None) -> Tensor:
    """The loss of a GAN's discriminator, each clip against 0 and not against its pair.

    Scores: [B]; weight: [B], of each teacher's clip -> scalar.  Scores of 0 give 2 ln 2.
    """
    return _weighted(F.softplus(-teacher_score), weight) + F.softplus(student_score).mean()


def non_saturating_loss(student_score: Tensor) -> Tensor:
    """What a GAN's generator descends on: -log P(its clip is taken for real).  [B] -> scalar.  0 gives ln 2."""
    return F.softplus(-student_score).mean()


def finite_difference_penalty(score: Tensor, moved_score: Tensor, step: float) -> Tensor:
    """R1 without a second derivative: (D(x + step e) - D(x))^2 / (2 step^2), e standard normal; [B], [B] -> scalar.

    Its expectation over e is |dD/dx|^2 / 2 to first order in `step` (R1: arXiv 1801.04406).
    """
    return 0.5 * ((moved_score - score) / step).square().mean()


def confidence_weight(teacher_score: Tensor, student_score: Tensor, takes: int, temperature: float) -> Tensor:
    """How far a teacher's clip is to be trusted: 2 sigmoid((its score - mean of its prompt's rollouts) / temperature).

    Scores: [P takes], paired -> [P takes] in (0, 2), without gradient; 1 where a clip is as good as the rollouts.
    """
    gap = (teacher_score - student_score).detach().unflatten(0, (-1, takes)).mean(1)
    return (2 * torch.sigmoid(gap / temperature)).repeat_interleave(takes)


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses.mean() if weight is None else (weight * losses).mean()


def forward_process_loss(
    v_student: Tensor, v_old: Tensor, v_target: Tensor, weight: Tensor, policy_mix: float, adaptive: bool = False
) -> Tensor:
    """Flow matching towards liked and away from disliked samples (eq. 4; policy_mix is its beta).

    v_*: [B, F, C, H, W], v_old without gradient; weight: [B, F] or [B, 1] in [0, 1], 1/2 is no opinion; policy_mix in
    (0, 1] -> scalar.  With w = 1/2 and v_student = v_old the two branches cancel.  The lag of v_old is the only
    restoring force: it holds a trust region policy_mix^2 |v_student - v_old|^2.  `adaptive` divides the error of a
    frame in each branch by its mean absolute deviation, without gradient (DiffusionNFT, arXiv 2509.16117, does so with
    errors of the clean estimate, which are t times these).
    """
    step = policy_mix * (v_student - v_old)
    towards, away = (_frame_error(v_old + sign * step, v_target, adaptive) for sign in (1, -1))
    return (weight * towards + (1 - weight) * away).mean()


def _frame_error(v: Tensor, target: Tensor, adaptive: bool) -> Tensor:
    """Mean squared error of each frame: [B, F, ...] -> [B, F]."""
    error = per_frame_mse(v, target)
    if not adaptive:
        return error
    return error / (v - target).detach().abs().flatten(2).mean(2).clamp_min(1e-5)


def branching_loss(clean: Tensor, old_clean: Tensor, shift: Tensor, scale: Tensor, policy_mix: float) -> Tensor:
    """Eq. 4 over all candidates of one context at once, as a regression of the clean estimate.

    clean: the student's estimate, with gradient; old_clean: the old policy's; shift: `branch_shift` of the candidates;
    all [B, F, C, H, W].  scale: [B, F], what each frame's error is divided by (1 is eq. 4) -> scalar.
    Eq. 4 in clean estimates x, old q and a sample s is mix^2 |x - q - ((2 w - 1) / mix) (s - q)|^2 and a constant.
    Candidates of one context share x and q, and their 2 w - 1 add up to 0, so that the mean over them is
    mix^2 |x - q - shift / mix|^2 and a constant.
    """
    target = old_clean + shift / policy_mix
    return (policy_mix**2 * per_frame_mse(clean, target) / scale).mean()


def branch_shift(candidates: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The step that the candidates of one context ask for together: mean_m (A_m / clip) (x_m - mean x).

    candidates: [M, ...]; advantages: [M, ...] that broadcasts against them, in [-clip, clip] with mean 0 over M ->
    [...].  A_m / clip is 2 w_m - 1 of eq. 4.
    """
    centred = candidates - candidates.mean(0, keepdim=True)
    return (advantages / clip * centred).mean(0)


def prior_loss(v_student: Tensor, v_reference: Tensor) -> Tensor:
    """Squared distance from the frozen reference student (eq. 5's second term).  [B, ...] -> scalar."""
    return per_clip_mse(v_student, v_reference).mean()


def flow_matching_loss(v_student: Tensor, v_target: Tensor, frame_weight: Tensor) -> Tensor:
    """Weighted flow matching.  v_*: [B, F, C, H, W]; frame_weight: [B, F] -> scalar."""
    return (frame_weight * per_frame_mse(v_student, v_target)).mean()


def distribution_matching_loss(clean: Tensor, real_clean: Tensor, fake_clean: Tensor) -> Tensor:
    """Distribution matching distillation (arXiv 2311.18828, eq. 7) as a regression target.

    clean: the student's clips, with gradient; real_clean, fake_clean: what the score of the data and the online score
    of the student's clips make of them, noised; all [B, F, C, H, W] -> scalar.  The gradient with respect to `clean`
    is (fake - real) / mean |clean - real| a clip, over the number of elements.
    """
    scale = (clean.detach() - real_clean).abs().flatten(1).mean(1).clamp_min(1e-4)
    direction = (fake_clean - real_clean) / scale[:, None, None, None, None]
    return 0.5 * (clean - (clean - direction).detach()).square().mean()
