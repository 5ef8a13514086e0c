"""One update of each objective on a real small cache: what moves, what stays, and what is logged."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from afd_data.stream import Example
from afd_train.advantages import weights_from_advantages
from afd_train.draws import Draws
from afd_train.objective_config import AfdConfig, DistilConfig, FlowMatchingConfig, policies_of
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.afd import AdversarialFlowDistillation, histogram
from afd_train.objectives.distil import Distillation
from afd_train.objectives.flow_matching import chunk_times, frame_weight
from afd_train.objectives.forward_process import Step
from afd_train.objectives.judge import Judge
from afd_train.objectives.pairing import input_noise
from afd_train.objectives.parts import parts_of
from afd_train.optimizer import Optimizer

PROMPTS, TAKES = 3, 4
CPU = torch.device("cpu")


def weights(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


def copy_of(setup: Setup, policy: str) -> Tensor:
    """The weights of a policy beside the student."""
    return torch.cat([value.flatten() for value in setup.trainee.copies[policy]])


def draws_of(count: int, purpose: str = "") -> Draws:
    return Draws(0, 0, purpose, [str(number) for number in range(count)], CPU)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def prompts_of(setup: Setup) -> list[Example]:
    return setup.stream.next_batch(PROMPTS)


# What all objectives are given.


def test_latents_are_the_teachers_videos(setup_of):
    setup = setup_of(FlowMatchingConfig())
    examples = prompts_of(setup)
    decoded = setup.student.autoencoder.decode(setup.latents(examples))
    assert all(torch.equal(video, torch.from_numpy(e.video.copy())) for video, e in zip(decoded, examples, strict=True))


def test_randomness_follows_from_seed_step_and_purpose(setup_of):
    def draw(seed: int, step: int, purpose: str) -> float:
        setup = setup_of(FlowMatchingConfig(), seed)
        own = setup.draws(step, purpose, setup.stream.next_batch(1)).uniform()
        return float(own) + float(torch.rand((), generator=setup.shared(step, purpose)))

    draws = {draw(seed, step, purpose) for seed in (0, 1) for step in (0, 1) for purpose in ("noise", "time")}
    assert len(draws) == 8
    assert draw(0, 1, "time") == draw(0, 1, "time")


# Flow matching.


def test_a_chunk_has_one_time_and_no_time_is_too_small_to_divide_by():
    t = chunk_times(6, chunk=2, draws=draws_of(500))
    assert t.shape == (500, 6)
    assert torch.equal(t[:, ::2], t[:, 1::2])
    assert 0.02 <= float(t.min()) < 0.03
    assert 0.99 < float(t.max()) <= 1
    assert float(t.mean()) == pytest.approx(0.51, abs=0.02)


def test_velocity_errors_weigh_1_and_those_of_a_clean_prediction_t_squared_over_t(tiny_student):
    t = torch.tensor([[0.1, 0.5, 0.8]])
    assert frame_weight(tiny_student(prediction="velocity").net, t).tolist() == [[1.0, 1.0, 1.0]]
    # 0.01 / 0.5, 0.25 / 0.5, 0.64 / 0.8
    assert frame_weight(tiny_student(prediction="clean").net, t)[0].tolist() == pytest.approx([0.02, 0.5, 0.8])


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_flow_matching_learns_the_teachers_videos(setup_of, prediction):
    setup = setup_of(FlowMatchingConfig(), learning_rate=3e-3)
    setup.student.net.prediction = prediction
    objective = open_objective(setup)
    losses = [objective.step(prompts_of(setup), step)["student/loss"] for step in range(12)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("per_pass", [1, 2, 3])
def test_flow_matching_in_parts_takes_the_same_step(setup_of, per_pass):
    found = []
    for clips_per_pass in (None, per_pass):
        setup = setup_of(FlowMatchingConfig(), clips_per_pass=clips_per_pass, learning_rate=1e-30, max_grad_norm=1e9)
        gradients = kept_gradients(setup.trainee.optimizer)
        metrics = open_objective(setup).step(prompts_of(setup), step=0)
        found.append((gradients[0], metrics))
    (whole, expected), (parts, metrics) = found
    assert distance(parts, whole) < 1e-6 * float(whole.norm())
    assert metrics == pytest.approx(expected, rel=1e-5)


# Distillation.


def test_distillation_moves_student_and_fake_and_leaves_real(setup_of):
    setup = setup_of(DistilConfig(fake_learning_rate=1e-3))
    objective = open_objective(setup)
    assert isinstance(objective, Distillation)
    start = weights(setup.student.net)
    metrics = objective.step(prompts_of(setup), step=0)
    assert distance(weights(objective.real), start) == 0
    assert distance(weights(objective.modules["fake"]), start) > 0
    assert distance(weights(setup.student.net), start) > 0
    assert metrics.keys() == {"student/loss", "student/grad_norm", "fake/loss"}


def test_distillation_uses_prompts_and_no_video(setup_of):
    found = []
    for blank in (False, True):
        setup = setup_of(DistilConfig())
        objective = open_objective(setup)
        examples = prompts_of(setup)
        if blank:
            examples = [replace(example, video=0 * example.video) for example in examples]
        objective.step(examples, step=0)
        found.append(weights(setup.student.net))
    assert torch.equal(*found)


# Adversarial flow distillation.

LOGGED = {
    "discriminator/accuracy",
    "discriminator/margin",
    "discriminator/clean_accuracy",
    "discriminator/clean_margin",
    "discriminator/held_out_accuracy",
    "discriminator/held_out_loss",
    "discriminator/held_out_margin",
    "discriminator/loss",
    "discriminator/grad_norm",
    "discriminator/learning_rate",
    "advantage/spread",
    "student/diversity",
    "student/loss",
    "student/grad_norm",
    "student/old_policy_deviation",
    "student/reference_distance",
}
UNDECIDED = torch.full((PROMPTS * TAKES, 1), 0.5)
DECIDED = weights_from_advantages(torch.tensor([[5.0, -5.0] * 2] * PROMPTS).flatten()[:, None], clip=5.0)


def opened(setup: Setup) -> AdversarialFlowDistillation:
    objective = open_objective(setup)
    assert isinstance(objective, AdversarialFlowDistillation)
    return objective


def test_everything_that_tells_how_a_run_fares_is_logged(setup_of):
    setup = setup_of(AfdConfig())
    metrics = opened(setup).step(prompts_of(setup), step=0)
    assert {key for key in metrics if not key.startswith("weight/")} == LOGGED
    assert sum(value for key, value in metrics.items() if key.startswith("weight/")) == pytest.approx(1)
    assert {"seconds/rollout", "seconds/discriminator", "seconds/update"} <= setup.watch.read().keys()


def test_the_old_policy_and_the_reference_are_kept_beside_the_student_for_afd_only():
    assert policies_of(AfdConfig()) == ("old", "reference")
    assert policies_of(DistilConfig()) == policies_of(FlowMatchingConfig()) == ()


def test_a_step_moves_student_and_discriminator_and_the_old_policy_lags(setup_of):
    setup = setup_of(AfdConfig(old_policy_decay=0.75), learning_rate=1e-3)
    objective = opened(setup)
    start, judge = weights(setup.student.net), weights(objective.modules["discriminator"])
    objective.step(prompts_of(setup), step=0)
    moved = weights(setup.student.net) - start
    assert moved.norm() > 0
    assert distance(weights(objective.modules["discriminator"]), judge) > 0
    assert distance(copy_of(setup, "reference"), start) == 0
    assert distance(copy_of(setup, "old"), start + 0.25 * moved) < 1e-4 * float(moved.norm())


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("copy", 0, 1.0),
        ("ramp", 399, 0.6),  # after update 400 the decay is 0.4
        ("late-ramp", 74, 1.0),
        ("late-ramp", 174, 0.25),  # 0.0075 x 100
    ],
)
def test_the_old_policy_follows_by_its_schedule_counted_from_1(setup_of, schedule, step, share):
    setup = setup_of(AfdConfig(old_policy_schedule=schedule), learning_rate=1e-3)
    start = weights(setup.student.net)
    opened(setup).step(prompts_of(setup), step)
    moved = weights(setup.student.net) - start
    assert distance(copy_of(setup, "old"), start + share * moved) < 1e-4 * float(moved.norm())


def test_the_first_step_is_taken_at_the_old_policy_and_at_the_reference(setup_of):
    # Student, old policy and reference are equal there, up to rounding of one pass.
    setup = setup_of(AfdConfig())
    metrics = opened(setup).step(prompts_of(setup), step=0)
    assert metrics["student/old_policy_deviation"] < 1e-9
    assert metrics["student/reference_distance"] < 1e-9


def test_a_step_reaches_every_weight_of_the_student(setup_of):
    setup = setup_of(AfdConfig(), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in setup.student.net.named_parameters()}
    opened(setup).step(prompts_of(setup), step=0)
    assert [n for n, p in setup.student.net.named_parameters() if torch.equal(p, before[n])] == []


def test_without_opinions_the_student_rests(setup_of):
    """Equal scores: all weights 1/2, and at the old policy nothing pulls."""
    setup = setup_of(AfdConfig(prior_weight=0.0))
    update = opened(setup)._forward_process.update
    drawn = Step.drawn(setup, prompts_of(setup), step=0)
    undecided = update(drawn, UNDECIDED)
    decided = update(drawn, DECIDED)
    assert undecided["student/grad_norm"] < 1e-4 * decided["student/grad_norm"]


def test_the_log_tells_how_many_rollouts_are_liked():
    assert histogram(UNDECIDED.flatten())["weight/0.5_to_0.6"] == 1
    decided = histogram(DECIDED.flatten())
    assert (decided["weight/0.0_to_0.3"], decided["weight/0.7_to_1.0"]) == (0.5, 0.5)
    assert sum(decided.values()) == 1


def test_liked_rollouts_come_nearer_and_disliked_ones_move_away(setup_of):
    """The update lowers the flow-matching error of what the discriminator liked, relative to what it disliked."""
    setup = setup_of(AfdConfig(), learning_rate=1e-3)
    update, examples = opened(setup)._forward_process.update, prompts_of(setup)
    rollouts, text = Step.drawn(setup, examples, step=0), setup.text(examples)

    @torch.no_grad()
    def gap() -> float:
        """Error on the liked minus error on the disliked rollouts, at the time of the sampler."""
        noise = torch.randn(rollouts.clips.shape, generator=torch.Generator().manual_seed(1))
        t = torch.ones(rollouts.clips.shape[:2])
        error = (setup.student.net(noise, t, text, clean=rollouts.clips) - (noise - rollouts.clips)).square()
        liked = DECIDED.flatten() == 1
        return float(error[liked].mean() - error[~liked].mean())

    before = gap()
    for step in range(10):
        # Its cache holds the keys and values of the student that drew the clips.
        update(replace(rollouts, number=step, cache=None), DECIDED)
    assert gap() < before


def test_both_sides_reach_the_discriminator_as_8_bit_video(setup_of):
    setup = setup_of(AfdConfig())
    judge, examples = Judge(setup), prompts_of(setup)
    seen: list[Tensor] = []
    judge.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rollouts = setup.rollout(examples, 0, range(1)).clips
    judge.score(examples, rollouts, 0)
    assert torch.equal(setup.student.autoencoder.round_trip(seen[0]), seen[0])
    assert torch.equal(seen[0][:PROMPTS], setup.latents(examples))
    assert not torch.equal(seen[0][PROMPTS:], rollouts)


def test_the_teachers_own_videos_score_like_the_teacher(setup_of):
    setup = setup_of(AfdConfig())
    examples = prompts_of(setup)
    teacher, student = Judge(setup).score(examples, setup.latents(examples), 0)
    torch.testing.assert_close(teacher, student, rtol=0, atol=1e-6)


def test_the_clips_of_a_prompt_meet_the_discriminator_under_one_level_of_noise_from_none_to_the_largest():
    group = torch.arange(200).repeat(2)
    noises = draws_of(200, "teacher"), draws_of(200, "student")
    noise = input_noise((400, 4, 3, 16, 16), group, largest=0.8, levels=draws_of(200), noises=noises)
    teacher, student = noise.flatten(1).std(1).chunk(2)
    torch.testing.assert_close(teacher, student, rtol=0.08, atol=0)  # 3072 draws a clip: 1.3 % each
    assert 0 < teacher.min() < 0.02
    assert 0.78 < teacher.max() < 0.84
    assert float(teacher.mean()) == pytest.approx(0.4, abs=0.05)  # uniform; 200 groups: 0.016


def test_every_rollout_meets_the_teachers_video_of_its_own_prompt(setup_of):
    setup = setup_of(AfdConfig())
    judge, examples = Judge(setup), prompts_of(setup)
    single, _ = judge.score(examples, setup.latents(examples), 0)
    paired, other = judge.score(examples, setup.latents(examples).repeat_interleave(TAKES, 0), 0)
    torch.testing.assert_close(paired, single.repeat_interleave(TAKES, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(paired, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_pass", [1, 2, 3, 5, 8])
def test_scores_do_not_depend_on_how_many_clips_are_scored_at_once(setup_of, per_pass):
    setup = setup_of(AfdConfig())
    judge, examples = Judge(setup), prompts_of(setup)
    rollouts = setup.rollout(examples, 0, range(TAKES)).clips
    whole = judge.score(examples, rollouts, 0)
    setup.config = setup.config.model_copy(update={"clips_per_pass": per_pass})
    torch.testing.assert_close(judge.score(examples, rollouts, 0), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"mismatch_weight": 0.5, "r1_weight": 0.1, "r1_step": 1.0}])
@pytest.mark.parametrize("per_pass", [1, 2, 3, 5, 8])
def test_the_discriminator_learns_the_same_in_parts(setup_of, per_pass, settings):
    setup = setup_of(AfdConfig(), max_grad_norm=1e9)
    setup.discriminator = setup.discriminator.model_copy(update=settings)
    judge, examples = Judge(setup), prompts_of(setup)
    gradients = kept_gradients(judge.optimizer)
    rollouts = setup.rollout(examples, 0, range(TAKES)).clips
    logs = []
    for limit in (None, per_pass):
        setup.config = setup.config.model_copy(update={"clips_per_pass": limit})
        logs.append(judge.learn(examples, rollouts, step=3, rate=1e-30))
    whole, parts = gradients
    assert distance(parts, whole) < 1e-6 * float(whole.norm())
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[0]["discriminator/grad_norm"] == pytest.approx(float(whole.norm()), rel=1e-5)


def kept_gradients(optimizer: Optimizer) -> list[Tensor]:
    """What an optimiser is given, all weights in a row, once a step."""
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found.append(torch.cat([w.grad.detach().flatten() for w in optimizer.masters if w.grad is not None]))

    optimizer.adamw.register_step_pre_hook(keep)
    return found


def test_parts_hold_every_clip_once_and_in_order_and_no_more_than_the_limit():
    for prompts in range(6):
        for takes in range(1, 6):
            for limit in (None, *range(1, 6), 100):
                rows, clips = list(range(prompts * takes)), []
                for part in parts_of(prompts, takes, limit):
                    own = [prompt * takes + take for prompt in range(prompts)[part.prompts] for take in part.takes]
                    assert own == rows[part.rows]
                    assert 0 < len(own) <= (limit or prompts * takes)
                    clips += own
                assert clips == rows, (prompts, takes, limit)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(None, [12]), (100, [12]), (12, [12]), (11, [8, 4]), (5, [4] * 3), (4, [4] * 3), (3, [3, 1] * 3), (1, [1] * 12)],
)
def test_parts_are_whole_groups_where_they_fit(limit, sizes):
    assert [len(range(12)[part.rows]) for part in parts_of(PROMPTS, TAKES, limit)] == sizes


def test_the_shuffled_control_gives_the_same_advantages_to_other_rollouts(setup_of):
    found = []
    for control in (False, True):
        setup = setup_of(AfdConfig(shuffled_advantages=control))
        objective = opened(setup)
        examples = prompts_of(setup)
        _, scores = objective.judge.score(examples, setup.rollout(examples, 0, range(TAKES)).clips, 0)
        found.append(objective._advantages(examples, scores.unflatten(0, (PROMPTS, TAKES)), step=0))
    plain, control = found
    assert not torch.equal(plain, control)
    assert torch.equal(plain.sort(1).values, control.sort(1).values)


def test_the_warm_up_moves_the_discriminator_only_and_logs_steps_below_0(setup_of):
    setup = setup_of(AfdConfig())
    objective = opened(setup)
    start, before = weights(setup.student.net), weights(objective.modules["discriminator"])
    rows = []
    objective.prepare(lambda step, metrics: rows.append((step, metrics)))
    assert [step for step, _ in rows] == [-2, -1]
    assert all({"discriminator/loss", "discriminator/held_out_margin"} <= metrics.keys() for _, metrics in rows)
    assert torch.equal(weights(setup.student.net), start)
    assert distance(weights(objective.modules["discriminator"]), before) > 0


def test_a_step_is_a_function_of_its_number(setup_of):
    found = []
    for _ in range(2):
        setup = setup_of(AfdConfig())
        objective = opened(setup)
        torch.manual_seed(len(found))  # the global generator plays no part
        metrics = objective.step(prompts_of(setup), step=7)
        found.append((metrics, weights(setup.student.net)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("objective", [AfdConfig(), DistilConfig(), FlowMatchingConfig()], ids=lambda o: o.name)
def test_clips_of_a_single_chunk_can_be_learnt(setup_of, objective):
    setup = setup_of(objective, frames=2)
    examples = [replace(example, video=example.video[:2]) for example in prompts_of(setup)]
    setup.held_out = None
    assert math.isfinite(open_objective(setup).step(examples, step=0)["student/loss"])


@pytest.mark.parametrize("per_pass", [1, 3, 5])
def test_a_step_in_parts_logs_what_one_at_once_does(setup_of, per_pass):
    found = []
    for clips_per_pass in (None, per_pass):
        setup = setup_of(AfdConfig(), clips_per_pass=clips_per_pass, learning_rate=1e-30)
        objective, rows = opened(setup), []
        objective.prepare(lambda _, metrics, rows=rows: rows.append(metrics))
        with torch.no_grad():  # so that the old policy is another one
            for weight in setup.trainee.parameters:
                weight += 0.01
        found.append([*rows, objective.step(prompts_of(setup), step=0)])
    for part, whole in zip(*found, strict=True):
        assert part.keys() == whole.keys()
        smooth = [key for key in whole if "accuracy" not in key and not key.startswith("weight/")]
        # Not closer, because a pixel may be rounded to the next of its 256 values.
        assert [part[key] for key in smooth] == pytest.approx([whole[key] for key in smooth], rel=0.02, abs=1e-4)
