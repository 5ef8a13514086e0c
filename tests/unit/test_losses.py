"""Every loss against numbers and gradients worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from afd_train.losses import (
    bradley_terry_loss,
    chunk_bradley_terry_loss,
    confidence_weight,
    distribution_matching_loss,
    finite_difference_penalty,
    flow_matching_loss,
    forward_process_loss,
    logistic_loss,
    non_saturating_loss,
    per_clip_mse,
    prior_loss,
)

B, N = 4, 2 * 3 * 2 * 2  # clips, and numbers in a clip
SHAPE = (B, 2, 3, 2, 2)


def clips(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V_OLD, TARGET = clips(1), clips(2)


def weights(value: float) -> torch.Tensor:
    return torch.full((B, 1), value, dtype=torch.float64)


def test_mse_is_taken_clip_by_clip():
    a = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert per_clip_mse(a, torch.zeros(2, 2)).tolist() == [5.0, 0.0]  # (1 + 9) / 2


def test_equal_scores_cost_ln_2():
    score = torch.tensor([-3.0, 0.0, 7.0])
    assert_close(bradley_terry_loss(score, score), torch.tensor(math.log(2)))


def test_bradley_terry_counts_only_the_difference_of_a_pair():
    # -log sigmoid(1) = log(1 + 1/e)
    loss = bradley_terry_loss(torch.tensor([5.0, -1.0]), torch.tensor([4.0, -2.0]))
    assert float(loss) == pytest.approx(math.log(1 + 1 / math.e))


def test_bradley_terry_pulls_equal_scores_apart_by_a_half_each():
    teacher, student = torch.zeros(B, requires_grad=True), torch.zeros(B, requires_grad=True)
    bradley_terry_loss(teacher, student).backward()
    assert_close(teacher.grad, torch.full((B,), -0.5 / B))
    assert_close(student.grad, torch.full((B,), 0.5 / B))


def test_every_chunk_is_a_pair_of_its_own():
    # Gaps 0 and ln 3: ln 2 and ln(1 + 1 / 3), averaged; the losing side's probability is 1 / 2 and 1 / 4.
    teacher = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    loss = chunk_bradley_terry_loss(teacher, torch.zeros(1, 2))
    assert float(loss.detach()) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    loss.backward()
    assert teacher.grad is not None
    assert teacher.grad.tolist() == [pytest.approx([-1 / 4, -1 / 8])]


def test_a_gans_discriminator_judges_each_clip_against_nothing():
    # softplus(-ln 3) = ln(4 / 3) and softplus(0) = ln 2; slopes -(1 - 3 / 4) and 1 / 2.  Other pairs, the same loss.
    teacher = torch.tensor([math.log(3)], requires_grad=True)
    student = torch.zeros(1, requires_grad=True)
    loss = logistic_loss(teacher, student)
    assert float(loss.detach()) == pytest.approx(math.log(4 / 3) + math.log(2))
    loss.backward()
    assert (float(teacher.grad), float(student.grad)) == pytest.approx((-1 / 4, 1 / 2))  # pyright: ignore
    scores = torch.tensor([1.0, -2.0])
    assert float(logistic_loss(scores, scores)) == pytest.approx(float(logistic_loss(scores, scores.flip(0))))


@pytest.mark.parametrize("loss", [bradley_terry_loss, logistic_loss])
def test_a_weight_is_of_the_teachers_clip(loss):
    zero, heavy = torch.zeros(2), torch.tensor([3.0, 0.0])
    ln2 = math.log(2)
    expected = {bradley_terry_loss: 1.5 * ln2, logistic_loss: 1.5 * ln2 + ln2}[loss]
    assert float(loss(zero, zero, heavy)) == pytest.approx(expected)


def test_a_penalty_by_differences_is_half_the_squared_slope():
    # One clip: ((1.2 - 1) / 0.1)^2 / 2.
    assert float(finite_difference_penalty(torch.tensor([1.0]), torch.tensor([1.2]), 0.1)) == pytest.approx(2)
    # A discriminator of slope (1, 2, 2) in random directions: |slope|^2 / 2 = 4.5, with a deviation of 4.5 sqrt(2 / n).
    directions = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    moved = 0.1 * directions @ torch.tensor([1.0, 2.0, 2.0])
    assert float(finite_difference_penalty(torch.zeros(20000), moved, 0.1)) == pytest.approx(4.5, rel=0.03)


def test_a_pair_counts_by_how_far_the_teachers_clip_is_above_its_prompts_rollouts():
    # Prompt 0: its clip 1 against a mean of (0 + 2) / 2; prompt 1: 0 against ln 3 throughout, sigmoid(-ln 3) = 1 / 4.
    teacher, student = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, math.log(3), math.log(3)])
    assert confidence_weight(teacher, student, takes=2, temperature=1.0).tolist() == pytest.approx([1, 1, 0.5, 0.5])


def test_a_gans_student_is_pulled_up_by_what_it_lacks_to_be_taken_for_real():
    score = torch.tensor([0.0, math.log(3)], requires_grad=True)
    loss = non_saturating_loss(score)
    # -log sigmoid(0) = log 2; -log sigmoid(log 3) = -log(3 / 4)
    assert float(loss.detach()) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    loss.backward()
    assert_close(score.grad, torch.tensor([-0.25, -0.125]))  # -(1 - p) / 2


def test_certain_scores_neither_overflow_nor_cost_anything():
    assert float(bradley_terry_loss(torch.tensor([1e4]), torch.tensor([-1e4]))) == 0
    assert float(bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4]))) == 2e4


def test_no_opinion_leaves_a_student_at_the_old_policy_unmoved():
    v = V_OLD.clone().requires_grad_()
    forward_process_loss(v, V_OLD, TARGET, weights(0.5), policy_mix=0.1).backward()
    assert_close(v.grad, torch.zeros_like(v))  # the two branches cancel


def test_full_weight_and_full_mix_is_plain_flow_matching():
    v = clips(3)
    assert_close(forward_process_loss(v, V_OLD, TARGET, weights(1.0), policy_mix=1.0), F.mse_loss(v, TARGET))


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.8, 1.0])
def test_at_the_old_policy_the_gradient_is_a_signed_flow_matching_step(weight):
    v, mix = V_OLD.clone().requires_grad_(), 0.1
    forward_process_loss(v, V_OLD, TARGET, weights(weight), mix).backward()
    assert_close(v.grad, 2 * mix * (2 * weight - 1) * (V_OLD - TARGET) / (B * N))


def test_without_opinion_the_loss_is_a_trust_region():
    # With s = mix (v - v_old) and e = v_old - target: (|e + s|^2 + |e - s|^2) / 2 = |e|^2 + |s|^2.
    v, mix = clips(3), 0.3
    loss = forward_process_loss(v, V_OLD, TARGET, weights(0.5), mix)
    assert_close(loss, F.mse_loss(V_OLD, TARGET) + mix**2 * F.mse_loss(v, V_OLD))


def test_the_optimum_is_a_bounded_shift_from_the_old_policy():
    weight, mix = 0.9, 0.4
    v = (V_OLD - (2 * weight - 1) / mix * (V_OLD - TARGET)).requires_grad_()
    forward_process_loss(v, V_OLD, TARGET, weights(weight), mix).backward()
    assert_close(v.grad, torch.zeros_like(v))


def test_each_clip_goes_by_its_own_weight():
    v = V_OLD.clone().requires_grad_()
    weight = torch.tensor([[0.5], [1.0], [0.5], [0.0]], dtype=torch.float64)
    forward_process_loss(v, V_OLD, TARGET, weight, policy_mix=1.0).backward()
    assert v.grad is not None
    assert_close(v.grad[[0, 2]], torch.zeros(2, *SHAPE[1:], dtype=torch.float64))
    towards, away = 2 * (V_OLD - TARGET)[1] / (B * N), -2 * (V_OLD - TARGET)[3] / (B * N)
    assert_close(v.grad[[1, 3]], torch.stack([towards, away]))


def test_prior_is_the_mean_squared_distance_from_the_reference():
    assert float(prior_loss(torch.full(SHAPE, 3.0), torch.ones(SHAPE))) == 4


def test_flow_matching_weighs_frames():
    v = torch.zeros(1, 2, 1, 1, 2)
    v[0, 0], v[0, 1] = 1.0, 2.0
    # frame errors 1 and 4, weights 3 and 0.5: (3 + 2) / 2
    assert float(flow_matching_loss(v, torch.zeros_like(v), torch.tensor([[3.0, 0.5]]))) == 2.5


def test_distribution_matching_moves_along_fake_minus_real_at_the_scale_of_the_clip():
    clean = clips(1).requires_grad_()
    real, fake = clips(2), clips(3)
    distribution_matching_loss(clean, real, fake).backward()
    scale = (clean.detach() - real).abs().flatten(1).mean(1)
    assert_close(clean.grad, (fake - real) / scale[:, None, None, None, None] / (B * N))


def test_distribution_matching_rests_where_both_scores_agree():
    clean = clips(1).requires_grad_()
    loss = distribution_matching_loss(clean, clips(2), clips(2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert_close(clean.grad, torch.zeros_like(clean))


def test_distribution_matching_stays_finite_when_the_real_estimate_is_the_clip_itself():
    clean = clips(1).requires_grad_()
    distribution_matching_loss(clean, clean.detach(), clips(3)).backward()
    assert clean.grad is not None
    assert clean.grad.isfinite().all()
