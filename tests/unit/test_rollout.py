"""Few-step sampling: a clip is a function of (prompt id, seed, take), and of nothing else."""

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from afd_train import draws
from afd_train.flow import clean_from_velocity, nearest_time, noised
from afd_train.rollout import ClipNoise, Sampler, rollout, rollout_chunks
from afd_train.student_config import StudentConfig
from afd_train.students import Clip, Student
from tests.dense_wan import oracle_of, stirred

CPU = torch.device("cpu")
PROMPTS = [("p1", "a red ball falls"), ("p2", "two blue boxes"), ("p3", "a green ball rolls")]
CLIPS = [Clip(key, text, seed=3, take=take) for key, text in PROMPTS for take in range(2)]


@pytest.fixture(params=[(1000,), (1000, 500)], ids=["one step", "two steps"])
def student(request, tiny_student):
    return tiny_student(frames=6, steps=request.param)


def test_the_first_chunk_is_the_clean_estimate_from_pure_noise(tiny_student):
    student = tiny_student(steps=(1000,))
    text = student.encode_text([CLIPS[0].prompt])
    noise = torch.randn(1, 2, 48, 4, 4, generator=draws.generator("p1", 3, 0))
    t = torch.ones(1, 2)
    with torch.no_grad():
        expected = clean_from_velocity(noise, student.net.chunk(noise, t, text, student.net.memory(2)), t)
    assert_close(student.rollout(CLIPS[:1]).clips[:, :2], expected)


def test_a_second_step_starts_from_the_estimate_noised_afresh(tiny_student):
    student = tiny_student(frames=2, steps=(1000, 500), shift=5.0)  # times 1 and 2.5 / 3
    text = student.encode_text([CLIPS[0].prompt])
    generator = draws.generator("p1", 3, 0)
    first, fresh = (torch.randn(1, 2, 48, 4, 4, generator=generator) for _ in range(2))
    one, later = torch.ones(1, 2), torch.full((1, 2), 2.5 / 3)
    with torch.no_grad():
        x = noised(
            clean_from_velocity(first, student.net.chunk(first, one, text, student.net.memory(2)), one), fresh, later
        )
        expected = clean_from_velocity(x, student.net.chunk(x, later, text, student.net.memory(2)), later)
    assert_close(student.rollout(CLIPS[:1]).clips, expected)


def test_the_cache_holds_every_chunk_but_the_last(student):
    drawn = student.rollout(CLIPS)
    assert drawn.clips.shape == (6, 6, 48, 4, 4)
    assert drawn.cache.frames == 4
    assert torch.equal(drawn.context, drawn.clips[:, :4])
    text, tokens = student.encode_text([clip.prompt for clip in CLIPS]), 4
    again = student.net.remember(drawn.context, text, student.net.memory(4))
    for layer, keys in again.keys.items():
        assert_close(drawn.cache.keys[layer][:, : 4 * tokens], keys, rtol=0, atol=1e-5)


def test_what_was_visited_at_the_last_step_leads_to_the_clip(student):
    drawn, times = student.rollout(CLIPS), Sampler.of(student.config, training=False).times
    assert [tuple(visited.shape) for visited in drawn.visited] == [(len(times), 6, 2, 48, 4, 4)] * 3
    last = torch.cat([visited[-1] for visited in drawn.visited], 1)
    text, t = student.encode_text([clip.prompt for clip in CLIPS]), torch.full((6, 6), times[-1])
    with torch.no_grad():
        v = student.net.chunks(last, t, text, drawn.cache)
    assert_close(clean_from_velocity(last, v, t), drawn.clips, rtol=0, atol=1e-5)


def test_a_clip_does_not_depend_on_the_batch_it_is_drawn_in(student):
    whole = student.rollout(CLIPS).clips
    alone = torch.cat([student.rollout([clip]).clips for clip in CLIPS])
    assert_close(alone, whole, rtol=0, atol=1e-5)


def test_a_clip_does_not_depend_on_its_place_in_the_batch(student):
    whole = student.rollout(CLIPS).clips
    assert_close(student.rollout(CLIPS[::-1]).clips.flip(0), whole, rtol=0, atol=1e-5)


def test_videos_do_not_depend_on_the_batch_size(student):
    whole = student.videos(PROMPTS, seed=3, takes=2)
    assert whole.shape == (3, 2, 6, 16, 16, 3)
    assert whole.dtype == np.uint8
    assert np.array_equal(student.videos(PROMPTS, seed=3, takes=2, batch=1), whole)
    assert np.array_equal(student.videos(PROMPTS, seed=3, takes=2, batch=4), whole)


def noise_of(clips: Sequence[tuple[str, int, int]], shape: tuple[int, ...] = (2, 1, 2, 2)) -> ClipNoise:
    return ClipNoise.of(clips, shape, CPU)


@pytest.mark.parametrize("other", [("p2", 3, 0), ("p1", 4, 0), ("p1", 3, 1)], ids=["prompt id", "seed", "take"])
def test_the_noise_follows_from_prompt_id_seed_and_take(other):
    assert torch.equal(noise_of([("p1", 3, 0)]).step(), noise_of([("p1", 3, 0)]).step())
    assert not torch.equal(noise_of([("p1", 3, 0)]).step(), noise_of([other]).step())


def test_noise_for_contexts_leaves_that_of_the_steps_alone():
    plain, mixed = (noise_of([("p1", 3, 0)]) for _ in range(2))
    context = mixed.context()
    for _ in range(2):
        fresh = plain.step()
        assert torch.equal(mixed.step(), fresh)
        assert not torch.equal(context, fresh)


def test_both_samplers_start_a_clip_from_the_same_noise(tiny_student):
    student = tiny_student(frames=6, steps=(1000, 500), renoised_context="training")
    learned, shown = (student.rollout(CLIPS, training=training) for training in (True, False))
    for index in range(3):
        assert torch.equal(learned.visited[index][0], shown.visited[index][0])
    assert not torch.equal(learned.clips[:, 2:], shown.clips[:, 2:])


def test_the_global_generator_is_neither_read_nor_moved(student):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    before = student.rollout(CLIPS[:1]).clips
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(student.rollout(CLIPS[:1]).clips, before)


def test_noise_is_standard_normal_and_fresh_at_every_call():
    source = noise_of([("p1", 0, take) for take in range(4)], (4, 12, 8, 8))
    first, second, context = source.step(), source.step(), source.context()
    assert first.shape == context.shape == (4, 4, 12, 8, 8)
    for draw in (first, context):
        assert abs(float(draw.mean())) < 0.03  # 12,288 numbers: the mean's standard error is 0.009
        assert float(draw.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((first * second).mean())) < 0.03
    assert abs(float((first * context).mean())) < 0.03
    assert abs(float((first[0] * first[1]).mean())) < 0.06


def test_the_stream_of_a_clip_equals_the_whole_clip(student):
    whole = student.videos(PROMPTS[:1], seed=3, takes=1)[0, 0]
    chunks = list(student.stream(Clip(*PROMPTS[0], seed=3, take=0)))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2]
    assert np.array_equal(np.concatenate(chunks), whole)


def test_a_longer_stream_starts_with_the_clip_and_goes_on(student):
    whole = student.videos(PROMPTS[:1], seed=3, takes=1)[0, 0]
    longer = np.concatenate(list(student.stream(Clip(*PROMPTS[0], seed=3, take=0), chunks=7)))
    assert longer.shape == (14, 16, 16, 3)
    assert np.array_equal(longer[:6], whole)
    assert not np.array_equal(longer[6], longer[8])


def test_the_first_chunk_is_there_before_the_rest_is_computed(tiny_student):
    student = tiny_student(window=4)
    stream = student.stream(Clip(*PROMPTS[0], seed=3, take=0), chunks=10**9)
    assert next(stream).shape == (2, 16, 16, 3)
    stream.close()


def test_rollouts_carry_no_gradient_and_leave_gradients_on(student):
    text = student.encode_text([clip.prompt for clip in CLIPS])
    sampler = Sampler.of(student.config, training=False)
    drawn = rollout(student.net, text, student.noise(CLIPS), sampler, student.chunks)
    assert not drawn.clips.requires_grad
    assert torch.is_grad_enabled()


# Every sampler, against an oracle without a cache.


FOUR, TWO, ONE = (1000, 750, 500, 250), (1000, 500), (1000,)
CASES = {
    "four steps": {"steps": FOUR},
    "two steps": {"steps": TWO},
    "one step": {"steps": ONE},
    "first chunk 4, then 1": {"steps": ONE, "first_chunk_steps": FOUR},
    "first chunk 4, then 2": {"steps": TWO, "first_chunk_steps": FOUR},
    "window": {"steps": TWO, "window": 4},
    "window and sink": {"steps": TWO, "window": 5, "sink": 2},
    "window and sink, frame-wise": {"steps": TWO, "window": 3, "sink": 1, "chunk_frames": 1},
    "frame-wise": {"steps": TWO, "chunk_frames": 1},
    "window and sink of a chunk": {"steps": ONE, "window": 7, "sink": 3, "chunk_frames": 3},
}


def drawn_and_expected(student: Student, chunks: int, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rollout of two clips, and what the oracle makes of the same noise."""
    sampler, names = Sampler.of(student.config, training=False), [("p1", 3, 0), ("p2", 3, 0)]
    shape = (student.config.chunk_frames, *student.shape[1:])
    text = student.encode_text([text for _, text in PROMPTS[:2]])
    drawn = rollout(student.net, text, noise_of(names, shape), sampler, chunks, prefix).clips
    oracle, noise = oracle_of(student.net, student.config.window, student.config.sink), noise_of(names, shape)
    with torch.no_grad():
        times = [sampler.first_times, *[sampler.times] * (chunks - 1)]
        expected = oracle.rollout(text, (noise.step() for _ in repeat(None)), times, prefix)
    return drawn.double(), expected


def stirred_student(tiny_student, **settings) -> Student:
    student = tiny_student(frames=12, **settings)
    stirred(student.net)
    return student


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_rollout_equals_the_dense_oracle(tiny_student, settings):
    student = stirred_student(tiny_student, **settings)
    drawn, expected = drawn_and_expected(student, chunks=4)
    assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["frame-wise", "window and sink, frame-wise", "window and sink"])
def test_a_rollout_from_an_image_equals_the_dense_oracle(tiny_student, case):
    student = stirred_student(tiny_student, **CASES[case])
    image = torch.randn(2, 1, *student.shape[1:], generator=torch.Generator().manual_seed(2))
    drawn, expected = drawn_and_expected(student, 4, image)
    assert torch.equal(drawn[:, :1], image.double())
    assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["two steps", "window and sink", "first chunk 4, then 1"])
def test_a_rollout_from_several_chunks_equals_the_dense_oracle(tiny_student, case):
    student = stirred_student(tiny_student, **CASES[case])
    prefix = torch.randn(2, 6, *student.shape[1:], generator=torch.Generator().manual_seed(2))
    drawn, expected = drawn_and_expected(student, 2, prefix)
    assert_close(drawn, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("context_noise", [0, 100])
def test_a_renoised_context_equals_the_dense_oracle(tiny_student, context_noise):
    student = stirred_student(tiny_student, steps=TWO, renoised_context="training", context_noise=context_noise)
    sampler, text = Sampler.of(student.config, training=True), student.encode_text([PROMPTS[0][1]])
    noise = noise_of([("p1", 3, 0)], (2, *student.shape[1:]))
    drawn = rollout(student.net, text, noise, sampler, 3)
    noise = noise_of([("p1", 3, 0)], (2, *student.shape[1:]))
    contexts = ((sampler.context_noise, noise.context()) for _ in repeat(None))
    with torch.no_grad():
        steps = (noise.step() for _ in repeat(None))
        expected = oracle_of(student.net).rollout(
            text, steps, [sampler.times] * 3, None, context_noise / 1000, contexts
        )
    assert_close(drawn.clips.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["window", "window and sink", "window and sink, frame-wise"])
def test_twelve_chunks_on_a_ring_equal_those_on_a_full_cache_and_the_oracle(tiny_student, case):
    student = stirred_student(tiny_student, **CASES[case])
    drawn, expected = drawn_and_expected(student, chunks=12)
    assert_close(drawn, expected, rtol=0, atol=1e-5)
    noise = noise_of([("p1", 3, 0), ("p2", 3, 0)], (student.config.chunk_frames, *student.shape[1:]))
    text = student.encode_text([text for _, text in PROMPTS[:2]])
    ring, sampler = student.net.memory(student.config.window or 0), Sampler.of(student.config, training=False)
    chunks = [chunk.clean for chunk in rollout_chunks(student.net, text, noise, sampler, 12, ring)]
    assert_close(torch.cat(chunks, 1).double(), drawn, rtol=0, atol=1e-5)
    assert ring.keys[0].shape[1] == ring.capacity * 4  # tokens of a frame


def test_groups_that_share_a_text_are_drawn_as_with_texts_of_their_own(student):
    repeated = student.encode_text([clip.prompt for clip in CLIPS])
    shared = student.rollout(CLIPS, student.encode_text([text for _, text in PROMPTS]))
    assert_close(shared.clips, student.rollout(CLIPS, repeated).clips, rtol=0, atol=1e-5)
    assert [keys.shape[0] for keys, _ in shared.cache.text.values()] == [3, 3]


# How a student is sampled.


def sampler(training: bool = False, **settings) -> Sampler:
    return Sampler.of(StudentConfig(steps=(1000, 500), shift=5.0, **settings), training)


def test_the_first_chunk_may_take_more_steps():
    drawn = sampler(first_chunk_steps=(1000, 750, 500, 250))
    assert drawn.times == pytest.approx((1, 2.5 / 3))
    assert drawn.first_times == pytest.approx((1, 0.9375, 2.5 / 3, 0.625))
    assert sampler().first_times == sampler().times


def test_contexts_are_noised_when_the_student_says_so():
    least = pytest.approx(0.005 / 1.004)  # 5 s / (1 + 4 s) at s = 0.001
    assert [sampler(training).context_noise for training in (False, True)] == [0, 0]
    assert [sampler(training, renoised_context="training").context_noise for training in (False, True)] == [0, least]
    assert [sampler(training, renoised_context="always").context_noise for training in (False, True)] == [least, least]


def test_the_times_of_contexts_are_told_as_set_and_noised_to_the_nearest_of_the_schedule():
    noisy = sampler(context_noise=100, renoised_context="always")
    assert noisy.context_time == 0.1
    assert noisy.context_noise == nearest_time(0.1, 5.0) == pytest.approx(0.1, abs=0.003)
