"""The discriminator sees what a clip shows and for which prompt, never how the clip was made."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from afd_train.discriminators import new_discriminator
from afd_train.discriminators.spacetime import SpaceTime
from afd_train.losses import bradley_terry_loss
from afd_train.students import Student

CONFIG = DiscriminatorConfig(dim=24, heads=2, layers=2)
PROMPTS = 16


@pytest.fixture
def student(tiny_student) -> Student:
    return tiny_student()


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


def train(net: SpaceTime, teacher: Tensor, student: Tensor, text: Tensor, steps: int) -> None:
    """Bradley-Terry as in the objective, with noise on both sides."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = CONFIG.input_noise * torch.randn(2, *teacher.shape, generator=generator)
        loss = bradley_terry_loss(net(teacher + noise[0], text), net(student + noise[1], text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: SpaceTime, teacher: Tensor, student: Tensor, text: Tensor) -> float:
    return float((net(teacher, text) > net(student, text)).float().mean())


def test_a_score_a_clip(student):
    net = new_discriminator(CONFIG, student, seed=0)
    clips, text = squares(student, 3, seed=0), student.encode_text(["a", "b", "c"])
    scores = net(clips, text)
    assert scores.shape == (3,)
    assert_close(net(clips[1:2], text[1:2]), scores[1:2], rtol=0, atol=1e-5)


def test_the_score_depends_on_the_prompt(student):
    net = new_discriminator(CONFIG, student, seed=0)
    clips = squares(student, 1, seed=0)
    assert not torch.equal(net(clips, student.encode_text(["red"])), net(clips, student.encode_text(["blue"])))


def test_the_score_depends_on_the_order_of_frames(student):
    net = new_discriminator(CONFIG, student, seed=0)
    clips, text = squares(student, 1, seed=0), student.encode_text(["red"])
    assert not torch.equal(net(clips, text), net(clips.flip(1), text))


def test_its_weights_follow_from_the_seed_alone(student):
    torch.manual_seed(1)
    first, state = new_discriminator(CONFIG, student, seed=0), torch.get_rng_state()
    torch.manual_seed(2)
    second = new_discriminator(CONFIG, student, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_its_layers_start_from_different_weights(student):
    first, second = new_discriminator(CONFIG, student, seed=0).blocks.layers
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.ndim == 1 or not torch.equal(a, b), name


def test_the_gradient_reaches_every_parameter(student):
    net = new_discriminator(CONFIG, student, seed=0)
    text = student.encode_text(["red", "blue"])
    net(squares(student, 2, seed=0), text).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


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
    net = new_discriminator(CONFIG, student, seed=0)
    teacher, text = squares(student, PROMPTS, seed=0), student.encode_text(["red"] * PROMPTS)
    loss = bradley_terry_loss(net(teacher, text), net(student.autoencoder.round_trip(teacher), text))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2))
    assert all(p.grad is not None and p.grad.abs().max() < 1e-6 for p in net.parameters())


def test_a_fresh_discriminator_cannot_tell_teacher_clips_from_round_tripped_ones(student):
    net = new_discriminator(CONFIG, student, seed=0)
    text = student.encode_text(["a square"] * 4 * PROMPTS)
    trip = student.autoencoder.round_trip
    train(net, squares(student, PROMPTS, 1), trip(squares(student, PROMPTS, 2)), text[:PROMPTS], steps=40)
    # 64 fresh pairs of different clips: chance is 0.5 with a standard error of 0.06.
    found = accuracy(net, squares(student, 4 * PROMPTS, 3), trip(squares(student, 4 * PROMPTS, 4)), text)
    assert found == pytest.approx(0.5, abs=0.16)


def test_it_learns_to_tell_clips_that_are_darker(student):
    """The control of the test above: the same training does find what there is to find."""
    net = new_discriminator(CONFIG, student, seed=0)
    text = student.encode_text(["a square"] * 4 * PROMPTS)
    train(net, squares(student, PROMPTS, 1), squares(student, PROMPTS, 2) - 1, text[:PROMPTS], steps=40)
    assert accuracy(net, squares(student, 4 * PROMPTS, 3), squares(student, 4 * PROMPTS, 4) - 1, text) > 0.9
