"""The small transformer sees what a clip shows and for which prompt, never how the clip was made.

Discriminators on other networks' features: test_trunks.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.testing import assert_close

from afd_train.discriminator_config import SpaceTimeConfig
from afd_train.discriminators import Prompts, open_discriminator
from afd_train.discriminators.spacetime import SpaceTime
from afd_train.losses import bradley_terry_loss
from afd_train.student_config import LatentShape
from afd_train.students import Student

CONFIG = SpaceTimeConfig(dim=24, heads=2, layers=2)
PROMPTS = 16


@pytest.fixture
def student(tiny_student) -> Student:
    return tiny_student()


def opened(student: Student, seed: int = 0, **settings: Any) -> SpaceTime:
    net = open_discriminator(CONFIG.model_copy(update=settings), student, seed)
    assert isinstance(net, SpaceTime)
    return net


def prompts_of(student: Student, texts: Sequence[str]) -> Prompts:
    return Prompts(texts, student.encode_text(texts))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(student: Student, count: int, seed: int) -> Tensor:
    """Latents of 8-bit clips in which a square of random colour moves: [count, 4, C, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    videos = torch.full((count, 4, 16, 16, 3), 205, dtype=torch.uint8)
    for video in videos:
        row, column = torch.randint(12, (2,), generator=generator).tolist()
        colour = torch.randint(256, (3,), generator=generator).to(torch.uint8)
        for frame in range(4):
            video[frame, row : row + 4, (column + frame) % 12 : (column + frame) % 12 + 4] = colour
    return student.autoencoder.encode(videos)


def train(net: SpaceTime, teacher: Tensor, student: Tensor, prompts: Prompts, steps: int) -> None:
    """Bradley-Terry as in the objective, with noise on both sides."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = CONFIG.input_noise * torch.randn(2, *teacher.shape, generator=generator)
        sides = (net(clips + each, prompts).mean(1) for clips, each in zip((teacher, student), noise, strict=True))
        loss = bradley_terry_loss(*sides)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: SpaceTime, teacher: Tensor, student: Tensor, prompts: Prompts) -> float:
    return float((net(teacher, prompts) > net(student, prompts)).float().mean())


def test_a_score_a_clip(student):
    net = opened(student)
    clips, prompts = squares(student, 3, seed=0), prompts_of(student, ["a", "b", "c"])
    scores = net(clips, prompts)
    assert scores.shape == (3, 1)
    assert_close(net(clips[1:2], prompts.of([1])), scores[1:2], rtol=0, atol=1e-5)


def test_the_score_depends_on_the_prompt(student):
    net = opened(student)
    clips = squares(student, 1, seed=0)
    assert not torch.equal(net(clips, prompts_of(student, ["red"])), net(clips, prompts_of(student, ["blue"])))


def test_the_score_depends_on_the_order_of_frames(student):
    net = opened(student)
    clips, prompts = squares(student, 1, seed=0), prompts_of(student, ["red"])
    assert not torch.equal(net(clips, prompts), net(clips.flip(1), prompts))


def test_its_weights_follow_from_the_seed_alone(student):
    torch.manual_seed(1)
    first, state = opened(student), torch.get_rng_state()
    torch.manual_seed(2)
    second = opened(student)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_its_layers_start_from_different_weights(student):
    first, second = opened(student).blocks
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b), name


@pytest.mark.parametrize("settings", [{}, {"chunk_causal": True}, {"reference": True}, {"view": "luminance"}])
def test_the_gradient_reaches_every_parameter(student, settings):
    net = opened(student, **settings)
    clips = squares(student, 2, seed=0)
    net(clips, prompts_of(student, ["red", "blue"]), clips.flip(0)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.fixture
def long_student(tiny_student) -> Student:
    """Three chunks of two frames."""
    return tiny_student(frames=6)


def chunk_causal(student: Student, **settings: Any) -> tuple[SpaceTime, Tensor, Prompts]:
    """In float64, with two clips."""
    net = opened(student, chunk_causal=True, **settings).double()
    clips = noise(2, *student.shape).double()
    texts = ["red falls", "blue"]
    return net, clips, Prompts(texts, student.encode_text(texts).double())


@pytest.mark.parametrize("settings", [{}, {"reference": True}, {"tubelet_frames": 1}], ids=str)
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_later_frames_cannot_change_the_scores_of_earlier_chunks(long_student, settings, chunk):
    net, clips, prompts = chunk_causal(long_student, **settings)
    changed = clips.clone()
    changed[:, 2 * chunk :] += 1
    before, after = net(clips, prompts, clips.flip(0)), net(changed, prompts, clips.flip(0))
    assert before.shape == (2, 3)
    assert torch.equal(before[:, :chunk], after[:, :chunk])
    assert (before[:, chunk:] != after[:, chunk:]).all()


def test_every_chunk_is_scored_with_the_words_and_the_reference(long_student):
    net, clips, prompts = chunk_causal(long_student, reference=True)
    scores = net(clips, prompts, clips.flip(0))
    assert (net(clips, prompts.of([1, 0]), clips.flip(0)) != scores).all()
    assert (net(clips, prompts, clips.flip(0) + 1) != scores).all()


def test_the_clip_and_its_reference_are_not_taken_for_each_other(student):
    net = opened(student, reference=True)
    (one, other), prompts = squares(student, 2, seed=0).split(1), prompts_of(student, ["red"])
    assert not torch.allclose(net(one, prompts, other), net(other, prompts, one))


def tinted(clips: Tensor) -> Tensor:
    """More red and as much less blue in every latent pixel: the mean over colours stays."""
    cells = clips.unflatten(2, (3, -1)).clone()
    cells[:, :, 0] += 0.7
    cells[:, :, 2] -= 0.7
    return cells.flatten(2, 3)


@pytest.mark.parametrize("view", ["luminance", "luminance-differences"])
def test_a_view_of_luminance_does_not_see_colours(student, view):
    clips, prompts = noise(1, *student.shape), prompts_of(student, ["red"])
    net = opened(student, view=view)
    assert_close(net(tinted(clips), prompts), net(clips, prompts))
    assert not torch.allclose(net(clips.flip(1), prompts), net(clips, prompts))
    control = opened(student)
    assert not torch.allclose(control(tinted(clips), prompts), control(clips, prompts))


def test_a_view_of_differences_sees_neither_a_still_background_nor_how_bright_it_is(student):
    # The scale that it divides by has 0.001 added: clips of size 100 make that 1e-5 of it.
    clips, prompts = 100 * noise(1, *student.shape), prompts_of(student, ["red"])
    background = 30 * noise(1, 1, *student.shape[1:], seed=1)
    net, control = opened(student, view="luminance-differences"), opened(student, view="luminance")
    assert_close(net(2 * clips + background, prompts), net(clips, prompts), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(control(2 * clips + background, prompts), control(clips, prompts), rtol=1e-3, atol=1e-4)


SHAPE = LatentShape(frames=6, channels=48, height=4, width=6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tubelet_frames": 4}, "tubelet_frames: 4 does not divide the 6 latent frames of a clip"),
        ({"patch": 4}, "patch: 4 does not divide the 6 x 4 latent pixels of a clip"),
        (
            {"tubelet_frames": 2, "chunk_causal": True},
            "tubelet_frames: 2 does not divide the 3 latent frames of a chunk",
        ),
        ({"loss": "bt-chunk"}, "loss: bt-chunk needs a discriminator that scores every chunk"),
        ({"tubelet_frames": 2, "patch": 2}, None),
        ({"tubelet_frames": 3, "chunk_causal": True, "loss": "bt-chunk"}, None),
    ],
)
def test_clips_that_it_cannot_judge_are_named(settings, problem):
    found = SpaceTimeConfig(**settings).problem_with(SHAPE, 3)
    assert (found or "").startswith(problem or "")
    assert (found is None) == (problem is None)


def test_luminance_of_latents_that_are_no_pixels_is_refused():
    found = SpaceTimeConfig(view="luminance").problem_with(SHAPE._replace(channels=16), 3)
    assert found is not None
    assert found.startswith("view: luminance is of latents that are pixels")


def test_round_tripped_teacher_clips_are_the_teachers_bit_for_bit(student):
    teacher = squares(student, PROMPTS, seed=0)
    assert torch.equal(student.autoencoder.round_trip(teacher), teacher)


def test_a_clip_that_differs_by_less_than_a_level_becomes_the_teachers(student):
    # A student that drew exactly the teacher's video still draws floats; a level is 2 / 127.5 = 0.0157.
    teacher = squares(student, PROMPTS, seed=0)
    drawn = teacher + 0.007 * (2 * torch.rand(teacher.shape, generator=torch.Generator().manual_seed(0)) - 1)
    assert not torch.equal(drawn, teacher)
    assert torch.equal(student.autoencoder.round_trip(drawn), teacher)


def test_between_a_clip_and_its_round_trip_there_is_nothing_to_learn(student):
    net = opened(student)
    teacher, prompts = squares(student, PROMPTS, seed=0), prompts_of(student, ["red"] * PROMPTS)
    scores = (net(clips, prompts).mean(1) for clips in (teacher, student.autoencoder.round_trip(teacher)))
    loss = bradley_terry_loss(*scores)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert all(p.grad is not None and p.grad.abs().max() < 1e-6 for p in net.parameters())


def test_a_fresh_discriminator_cannot_tell_teacher_clips_from_round_tripped_ones(student):
    net = opened(student)
    prompts = prompts_of(student, ["a square"] * 4 * PROMPTS)
    trip = student.autoencoder.round_trip
    train(net, squares(student, PROMPTS, 1), trip(squares(student, PROMPTS, 2)), prompts.of(range(PROMPTS)), steps=40)
    # 64 fresh pairs of different clips: chance is 0.5 with a standard error of 0.06.
    found = accuracy(net, squares(student, 4 * PROMPTS, 3), trip(squares(student, 4 * PROMPTS, 4)), prompts)
    assert found == pytest.approx(0.5, abs=0.16)


def test_it_learns_to_tell_clips_that_are_darker(student):
    """The control of the test above: the same training does find what there is to find."""
    net = opened(student)
    prompts = prompts_of(student, ["a square"] * 4 * PROMPTS)
    train(net, squares(student, PROMPTS, 1), squares(student, PROMPTS, 2) - 1, prompts.of(range(PROMPTS)), steps=40)
    assert accuracy(net, squares(student, 4 * PROMPTS, 3), squares(student, 4 * PROMPTS, 4) - 1, prompts) > 0.9


def test_a_view_of_the_whole_clip_is_refused_to_a_discriminator_of_chunks():
    with pytest.raises(ValidationError, match="view: luminance is normalised over the whole clip"):
        SpaceTimeConfig(chunk_causal=True, view="luminance")
