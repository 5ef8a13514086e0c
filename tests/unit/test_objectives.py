"""One update of each objective on a real small cache: what moves, what stays, and what is logged."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from afd_data.stream import Example, Stream
from afd_train.config import AfdConfig, DistilConfig, FlowMatchingConfig, Recipe, TrainConfig
from afd_train.objectives import Setup, open_objective
from afd_train.objectives.afd import AdversarialFlowDistillation, input_noise
from afd_train.objectives.flow_matching import chunk_times, frame_weight
from afd_train.policies import Trainee
from afd_train.runlog import Stopwatch
from afd_train.students import Clip, new_student

PROMPTS, TAKES = 3, 4


@pytest.fixture
def setup_of(tiny_recipe, tmp_path, playground_cache) -> Callable[..., Setup]:
    """`setup_of(AfdConfig(), seed=0, frames=4)` -> what an objective is given, on the small cache."""

    def make(objective, seed: int = 0, frames: int = 4, **settings) -> Setup:
        recipe: Recipe = tiny_recipe(tmp_path, seed=seed)
        config = TrainConfig(objective=objective, rollouts_per_prompt=TAKES, warmup_steps=0, **settings)
        video = recipe.video.model_copy(update={"frames": frames})
        accelerator = Accelerator()
        student = new_student(recipe.student, video, seed)
        return Setup(
            student=student,
            trainee=Trainee(student.net, config, accelerator),
            config=config,
            discriminator=recipe.discriminator,
            stream=Stream(playground_cache, recipe.stream, "train", seed),
            held_out=Stream(playground_cache, recipe.stream, "validation", seed),
            seed=seed,
            accelerator=accelerator,
            watch=Stopwatch(),
        )

    return make


def weights(net: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in net.parameters()])


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
        return float(torch.rand((), generator=setup_of(FlowMatchingConfig(), seed).generator(step, purpose)))

    draws = {draw(seed, step, purpose) for seed in (0, 1) for step in (0, 1) for purpose in ("noise", "time")}
    assert len(draws) == 8
    assert draw(0, 1, "time") == draw(0, 1, "time")


# Flow matching.


def test_a_chunk_has_one_time_and_no_time_is_too_small_to_divide_by():
    t = chunk_times(500, 6, chunk=2, generator=torch.Generator().manual_seed(0))
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


# Distillation.


def test_distillation_moves_student_and_fake_and_leaves_real(setup_of):
    setup = setup_of(DistilConfig(fake_learning_rate=1e-3))
    objective = open_objective(setup)
    start = weights(setup.student.net)
    metrics = objective.step(prompts_of(setup), step=0)
    assert distance(weights(objective.modules["real"]), start) == 0
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
    "discriminator/held_out_margin",
    "discriminator/loss",
    "discriminator/grad_norm",
    "advantage/spread",
    "student/loss",
    "student/grad_norm",
    "student/old_policy_deviation",
    "student/reference_distance",
}


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


def test_a_step_moves_student_and_discriminator_and_the_old_policy_lags(setup_of):
    setup = setup_of(AfdConfig(old_policy_decay=0.75), learning_rate=1e-3)
    objective = opened(setup)
    start = {name: weights(module) for name, module in objective.modules.items()}
    objective.step(prompts_of(setup), step=0)
    moved = weights(setup.student.net) - start["old"]
    assert moved.norm() > 0
    assert distance(weights(objective.modules["discriminator"]), start["discriminator"]) > 0
    assert distance(weights(objective.modules["reference"]), start["reference"]) == 0
    assert distance(weights(objective.modules["old"]), start["old"] + 0.25 * moved) < 1e-4 * float(moved.norm())


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
    objective = opened(setup)
    examples = prompts_of(setup)
    clips = [Clip(e.prompt_id, e.prompt, 0, take) for e in examples for take in range(TAKES)]
    rollouts = setup.student.rollout(clips)
    undecided = objective._update_student(examples, rollouts, torch.zeros(PROMPTS, TAKES), step=0)
    decided = objective._update_student(examples, rollouts, torch.tensor([[5.0, -5.0] * 2] * PROMPTS), step=0)
    assert undecided["student/grad_norm"] < 1e-4 * decided["student/grad_norm"]
    assert undecided["weight/0.5_to_0.6"] == 1
    assert (decided["weight/0.0_to_0.3"], decided["weight/0.7_to_1.0"]) == (0.5, 0.5)


def test_liked_rollouts_come_nearer_and_disliked_ones_move_away(setup_of):
    """The update lowers the flow-matching error of what the discriminator liked, relative to what it disliked."""
    setup = setup_of(AfdConfig(), learning_rate=1e-3)
    objective = opened(setup)
    examples = prompts_of(setup)
    clips = [Clip(e.prompt_id, e.prompt, 0, take) for e in examples for take in range(TAKES)]
    rollouts = setup.student.rollout(clips)
    advantages = torch.tensor([[5.0, -5.0] * 2] * PROMPTS)
    text = setup.student.encode_text([clip.prompt for clip in clips])

    @torch.no_grad()
    def gap() -> float:
        """Error on the liked minus error on the disliked rollouts, at the time of the sampler."""
        noise = torch.randn(rollouts.clips.shape, generator=torch.Generator().manual_seed(1))
        t = torch.ones(rollouts.clips.shape[:2])
        error = (setup.student.net(noise, t, text, clean=rollouts.clips) - (noise - rollouts.clips)).square()
        liked = advantages.flatten() > 0
        return float(error[liked].mean() - error[~liked].mean())

    before = gap()
    for step in range(10):
        objective._update_student(examples, rollouts, advantages, step)
    assert gap() < before


def test_both_sides_reach_the_discriminator_as_8_bit_video(setup_of):
    setup = setup_of(AfdConfig())
    objective = opened(setup)
    examples = prompts_of(setup)
    seen: list[Tensor] = []
    objective.modules["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rollouts = setup.student.rollout([Clip(e.prompt_id, e.prompt, 0, 0) for e in examples])
    objective._scores(examples, rollouts.clips, noise=None)
    assert torch.equal(setup.student.autoencoder.round_trip(seen[0]), seen[0])
    assert torch.equal(seen[0][:PROMPTS], setup.latents(examples))
    assert not torch.equal(seen[0][PROMPTS:], rollouts.clips)


def test_the_teachers_own_videos_score_like_the_teacher(setup_of):
    setup = setup_of(AfdConfig())
    examples = prompts_of(setup)
    teacher, student = opened(setup)._scores(examples, setup.latents(examples), noise=None)
    torch.testing.assert_close(teacher, student, rtol=0, atol=1e-6)


def test_the_clips_of_a_prompt_meet_the_discriminator_under_one_level_of_noise_from_none_to_the_largest():
    group = torch.arange(200).repeat(2)
    noise = input_noise(torch.zeros(400, 4, 3, 16, 16), group, largest=0.8, generator=torch.Generator().manual_seed(0))
    teacher, student = noise.flatten(1).std(1).chunk(2)
    torch.testing.assert_close(teacher, student, rtol=0.08, atol=0)  # 3072 draws a clip: 1.3 % each
    assert 0 < teacher.min() < 0.02
    assert 0.78 < teacher.max() < 0.84
    assert float(teacher.mean()) == pytest.approx(0.4, abs=0.05)  # uniform; 200 groups: 0.016


def test_every_rollout_meets_the_teachers_video_of_its_own_prompt(setup_of):
    setup = setup_of(AfdConfig())
    objective = opened(setup)
    examples = prompts_of(setup)
    single, _ = objective._scores(examples, setup.latents(examples), noise=None)
    paired, _ = objective._scores(examples, setup.latents(examples).repeat_interleave(TAKES, 0), noise=None)
    torch.testing.assert_close(paired, single.repeat_interleave(TAKES), rtol=0, atol=1e-6)


def test_the_shuffled_control_gives_the_same_advantages_to_other_rollouts(setup_of):
    found = []
    for control in (False, True):
        setup = setup_of(AfdConfig(shuffled_advantages=control))
        objective = opened(setup)
        examples = prompts_of(setup)
        clips = [Clip(e.prompt_id, e.prompt, 0, take) for e in examples for take in range(TAKES)]
        _, scores = objective._scores(examples, setup.student.rollout(clips).clips, noise=None)
        found.append(objective._advantages(scores.unflatten(0, (len(examples), TAKES)), step=0))
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
