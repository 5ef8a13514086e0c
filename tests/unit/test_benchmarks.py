"""The benchmarks measure what they say: the same clips, the same gradients, counted bytes and known arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from afd_data.config import VideoConfig
from afd_train.rollout import rollout
from afd_train.student_config import StudentConfig
from afd_train.students.spans import teacher_forcing_spans
from tests.benchmarks.memory import LIMIT, Bytes, Saved, extrapolated, kept, small
from tests.benchmarks.plain_loop import PlainLoop
from tests.benchmarks.sizes import Size, rollout_flops, size_of, update_flops
from tests.benchmarks.timing import Found
from tests.benchmarks.update import Form, Update
from tests.dense_wan import stirred

CPU = torch.device("cpu")
NARROW: dict[str, Any] = {"dim": 96, "heads": 4, "ffn_dim": 560, "text_dim": 16, "frequency_dim": 16}


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 6}, {"window": 6, "sink": 2}, {"first_chunk_steps": (1000, 500)}, {"context_noise": 100}],
    ids=lambda settings: " ".join(settings) or "all frames",
)
def test_the_plain_loop_draws_the_same_clips(settings):
    student = StudentConfig(dim=48, heads=2, layers=2, ffn_dim=64, text_dim=16, steps=(1000, 318), **settings)
    size = Size("small", student, VideoConfig(width=24, height=16, frames=10, fps=8.0), clips=2)
    net, text = stirred(size.net(CPU)), size.text(CPU)
    expected = PlainLoop(net, size.clips, size.shape).rollout(text, size.noise(CPU), size.sampler, chunks=5)
    assert_close(rollout(net, text, size.noise(CPU), size.sampler, chunks=5).clips, expected, rtol=0, atol=1e-5)


def test_a_full_size_rollout_takes_one_petaflop_and_an_update_more():
    size = size_of("1.3B")
    spans = teacher_forcing_spans(size.shape.frames, 3)
    assert rollout_flops(size, last_remembered=True) == pytest.approx(0.99e15, rel=0.02)
    assert update_flops(size, spans, checkpointing=False) == pytest.approx(1.30e15, rel=0.02)
    assert update_flops(size, spans, checkpointing=True) == pytest.approx(1.70e15, rel=0.02)


def update_of(layers: int, copies: int = 1) -> Update:
    """21 latent frames of 24 tokens, in chunks of 3, of a narrow student in float32."""
    return Update(small(layers, dtype="float32", **NARROW), CPU, copies)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_chunk_by_chunk_keeps_at_most_the_limit_of_teacher_forcings_bytes(checkpointing):
    update = update_of(layers=2)
    forced = kept(update, "teacher forcing", checkpointing)
    detached = kept(update, "detached chunk by chunk", checkpointing)
    assert forced.cache == 0
    assert detached.cache == 2 * 2 * 96 * 4 * (18 * 24 + 8)  # layers, keys and values, width, float32, tokens
    assert detached.total <= LIMIT * forced.total


@pytest.mark.parametrize("copies", [1, 2])
def test_both_detached_forms_add_the_same_gradient(copies):
    update = update_of(1, copies)
    gradients = [gradient(update, form) for form in ("detached at once", "detached chunk by chunk")]
    for at_once, by_chunk in zip(*gradients, strict=True):
        assert_close(by_chunk, at_once, rtol=1e-4, atol=1e-6)


def gradient(update: Update, form: Form) -> list[torch.Tensor]:
    """Of all weights."""
    update.net.zero_grad()
    update.run(form)
    return [parameter.grad.clone() for parameter in update.net.parameters() if parameter.grad is not None]


def test_saved_tensors_are_counted_once_and_until_they_are_released():
    x, weight = torch.zeros(1000, requires_grad=True), torch.zeros(1000, requires_grad=True)
    saved = Saved([weight])
    with saved.hooks():
        y = x.exp()  # saves its result, 4,000 bytes
        z = (y * weight).sum()  # saves y again, and what is left out
        w = y.sin().sum()  # and again
        assert saved.bytes == 4000
        (z + w).backward()
    assert (saved.bytes, saved.peak) == (0, 4000)


def test_counts_of_two_depths_give_a_third():
    counts = {2: Bytes(10, 4), 4: Bytes(14, 8)}
    assert extrapolated(counts, 30, scale=2) == Bytes(2 * 66, 2 * 60)


def test_ratios_are_taken_within_rounds():
    busy, other = Found([1.0, 10.0, 2.0], None), Found([2.0, 20.0, 3.0], None)
    assert other.ratio_to(busy) == 2
