"""Few-step sampling: a clip is a function of (prompt id, seed, take), and of nothing else."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from afd_train.flow import clean_from_velocity, noised
from afd_train.rollout import NoiseSource, clip_generator, rollout
from afd_train.students import Clip
from afd_train.students.attention import KVCache

PROMPTS = [("p1", "a red ball falls"), ("p2", "two blue boxes"), ("p3", "a green ball rolls")]
CLIPS = [Clip(key, text, seed=3, take=take) for key, text in PROMPTS for take in range(2)]


@pytest.fixture(params=[(1000,), (1000, 500)], ids=["one step", "two steps"])
def student(request, tiny_student):
    return tiny_student(frames=6, steps=request.param)


def test_the_first_chunk_is_the_clean_estimate_from_pure_noise(tiny_student):
    student = tiny_student(steps=(1000,))
    text = student.encode_text([CLIPS[0].prompt])
    noise = torch.randn(1, 2, 48, 4, 4, generator=clip_generator("p1", 3, 0))
    t = torch.ones(1, 2)
    with torch.no_grad():
        expected = clean_from_velocity(noise, student.net.chunk(noise, t, text, KVCache()), t)
    assert_close(student.rollout(CLIPS[:1]).clips[:, :2], expected)


def test_a_second_step_starts_from_the_estimate_noised_afresh(tiny_student):
    student = tiny_student(frames=2, steps=(1000, 500), shift=5.0)  # times 1 and 2.5 / 3
    text = student.encode_text([CLIPS[0].prompt])
    generator = clip_generator("p1", 3, 0)
    first, fresh = (torch.randn(1, 2, 48, 4, 4, generator=generator) for _ in range(2))
    one, later = torch.ones(1, 2), torch.full((1, 2), 2.5 / 3)
    with torch.no_grad():
        x = noised(clean_from_velocity(first, student.net.chunk(first, one, text, KVCache()), one), fresh, later)
        expected = clean_from_velocity(x, student.net.chunk(x, later, text, KVCache()), later)
    assert_close(student.rollout(CLIPS[:1]).clips, expected)


def test_the_cache_holds_every_chunk_but_the_last(student):
    drawn = student.rollout(CLIPS)
    assert drawn.clips.shape == (6, 6, 48, 4, 4)
    assert drawn.cache.frames == 4
    again = student.net.remember(drawn.clips[:, :4], student.encode_text([clip.prompt for clip in CLIPS]), KVCache())
    for layer, keys in again.keys.items():
        assert_close(drawn.cache.keys[layer], keys, rtol=0, atol=1e-5)


def test_what_was_visited_at_the_last_step_leads_to_the_clip(student):
    drawn = student.rollout(CLIPS)
    assert drawn.visited.shape == (len(student.times), 6, 6, 48, 4, 4)
    text, t = student.encode_text([clip.prompt for clip in CLIPS]), torch.full((6, 6), student.times[-1])
    with torch.no_grad():
        v = student.net.chunks(drawn.visited[-1], t, text, drawn.cache)
    assert_close(clean_from_velocity(drawn.visited[-1], v, t), drawn.clips, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("other", [("p2", 3, 0), ("p1", 4, 0), ("p1", 3, 1)], ids=["prompt id", "seed", "take"])
def test_the_noise_follows_from_prompt_id_seed_and_take(other):
    def draw(*names) -> torch.Tensor:
        return NoiseSource([clip_generator(*names)], (2, 1, 2, 2), torch.device("cpu"))()

    assert torch.equal(draw("p1", 3, 0), draw("p1", 3, 0))
    assert not torch.equal(draw("p1", 3, 0), draw(*other))


def test_the_global_generator_is_neither_read_nor_moved(student):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    before = student.rollout(CLIPS[:1]).clips
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(student.rollout(CLIPS[:1]).clips, before)


def test_noise_is_standard_normal_and_fresh_at_every_call():
    source = NoiseSource([clip_generator("p1", 0, take) for take in range(4)], (4, 12, 8, 8), torch.device("cpu"))
    first, second = source(), source()
    assert first.shape == (4, 4, 12, 8, 8)
    assert abs(float(first.mean())) < 0.03  # 12,288 numbers: the mean's standard error is 0.009
    assert float(first.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((first * second).mean())) < 0.03
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


def test_the_first_chunk_is_there_before_the_rest_is_computed(student):
    stream = student.stream(Clip(*PROMPTS[0], seed=3, take=0), chunks=10**9)
    assert next(stream).shape == (2, 16, 16, 3)
    stream.close()


def test_rollouts_carry_no_gradient_and_leave_gradients_on(student):
    text = student.encode_text([clip.prompt for clip in CLIPS])
    drawn = rollout(student.net, text, student.noise(CLIPS), student.times, student.chunks)
    assert not drawn.clips.requires_grad
    assert torch.is_grad_enabled()
