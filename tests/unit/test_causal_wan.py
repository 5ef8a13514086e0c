"""The causal network: what a frame may see, and that all ways to run it agree."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from afd_train.flow import clean_from_velocity
from afd_train.students.causal_wan import (
    CausalRope,
    CausalWan,
    ExactTimesteps,
    KVCache,
    SelfAttention,
    Span,
    block_causal_spans,
    continuation_spans,
    rotated,
    teacher_forcing_spans,
)
from afd_train.students.folder import save_student

B, FRAMES, CHUNK = 2, 6, 2


class Inputs:
    """A noisy and a clean clip, a time for every chunk, and a text."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.noisy = torch.randn(B, FRAMES, 48, 4, 4, generator=generator)
        self.clean = torch.randn(B, FRAMES, 48, 4, 4, generator=generator)
        self.text = torch.randn(B, 6, 16, generator=generator)
        self.t = torch.rand(B, FRAMES // CHUNK, generator=generator).repeat_interleave(CHUNK, 1)


@pytest.fixture
def net(tiny_student) -> CausalWan:
    return tiny_student(FRAMES).net


@pytest.fixture
def x() -> Inputs:
    return Inputs()


def changed(clips: torch.Tensor, frame: int) -> torch.Tensor:
    """The same up to `frame`, other numbers from there on."""
    clips = clips.clone()
    clips[:, frame:] += 1
    return clips


# What a frame may see.


def test_every_chunk_sees_itself_and_the_chunks_before():
    assert block_causal_spans(4, 2) == (Span((0, 2), ((0, 2),)), Span((2, 4), ((0, 4),)))


def test_a_noisy_chunk_sees_the_clean_chunks_before_it_and_itself():
    assert teacher_forcing_spans(4, 2) == (
        *block_causal_spans(4, 2),
        Span((4, 6), ((4, 6),)),
        Span((6, 8), ((0, 2), (6, 8))),
    )


def test_own_frames_stand_behind_the_cached_ones():
    # Four frames on a cache of the first two, which is enough: nothing sees the last clean chunk.
    assert continuation_spans(4, 2, cached=2) == (Span((0, 2), ((2, 4),)), Span((2, 4), ((0, 2), (4, 6))))


def test_spans_equal_attention_under_the_mask_they_stand_for():
    frames, tokens = 4, 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2 * frames * tokens, 12, generator=generator) for _ in range(3))
    frame = torch.arange(2 * frames).repeat_interleave(tokens)  # clean 0..3, noisy 4..7
    noisy, chunk = frame >= frames, frame % frames // CHUNK
    clean_context = ~noisy[None] & (chunk[None] <= chunk[:, None] - noisy[:, None].long())
    itself = noisy[:, None] & noisy[None] & (chunk[:, None] == chunk[None])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=clean_context | itself)
    assert_close(SelfAttention._attend(q, k, v, teacher_forcing_spans(frames, CHUNK), tokens), expected)


@pytest.mark.parametrize("frame", [2, 4])
def test_later_frames_cannot_change_earlier_ones(net, x, frame):
    with torch.no_grad():
        before = net(x.noisy, x.t, x.text)
        after = net(changed(x.noisy, frame), changed(x.t, frame).clamp(0, 1), x.text)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert not torch.equal(before[:, frame:], after[:, frame:])


def test_frames_of_a_chunk_see_each_other(net, x):
    with torch.no_grad():
        before, after = net(x.noisy, x.t, x.text), net(changed(x.noisy, 3), x.t, x.text)
    assert not torch.equal(before[:, 2], after[:, 2])


@pytest.mark.parametrize("frame", [2, 4])
def test_a_noisy_chunk_is_blind_to_its_own_clean_frames_and_to_other_noisy_ones(net, x, frame):
    chunk = slice(frame, frame + CHUNK)
    others = x.noisy + 1
    others[:, chunk] = x.noisy[:, chunk]
    with torch.no_grad():
        before = net(x.noisy, x.t, x.text, clean=x.clean)[:, chunk]
        assert torch.equal(before, net(x.noisy, x.t, x.text, clean=changed(x.clean, frame))[:, chunk])
        assert torch.equal(before, net(others, x.t, x.text, clean=x.clean)[:, chunk])
        assert not torch.equal(before, net(x.noisy, x.t, x.text, clean=changed(x.clean, frame - 1))[:, chunk])


def test_clips_of_a_batch_do_not_see_each_other(net, x):
    with torch.no_grad():
        both = net(x.noisy, x.t, x.text, clean=x.clean)
        alone = net(x.noisy[:1], x.t[:1], x.text[:1], clean=x.clean[:1])
    assert_close(both[:1], alone, rtol=0, atol=1e-5)


# All ways to run it agree.


def chunk_by_chunk(net: CausalWan, x: Inputs) -> torch.Tensor:
    cache, out = KVCache(), []
    for i in range(0, FRAMES, CHUNK):
        own = slice(i, i + CHUNK)
        out.append(net.chunk(x.noisy[:, own], x.t[:, own], x.text, cache))
        net.remember(x.clean[:, own], x.text, cache)
    return torch.cat(out, 1)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_chunks_on_a_cache_equal_teacher_forcing(tiny_student, x, prediction):
    net = tiny_student(FRAMES, prediction=prediction).net
    x.t = x.t.clamp_min(0.1)
    with torch.no_grad():
        expected = net(x.noisy, x.t, x.text, clean=x.clean)
        assert_close(chunk_by_chunk(net, x), expected, rtol=0, atol=1e-5)
        whole = net.remember(x.clean, x.text, KVCache())
        assert_close(net.chunks(x.noisy, x.t, x.text, whole), expected, rtol=0, atol=1e-5)
        enough = net.remember(x.clean[:, :-CHUNK], x.text, KVCache())
        assert_close(net.chunks(x.noisy, x.t, x.text, enough), expected, rtol=0, atol=1e-5)


def test_remembering_all_at_once_equals_chunk_after_chunk(net, x):
    whole, grown = net.remember(x.clean, x.text, KVCache()), KVCache()
    for i in range(0, FRAMES, CHUNK):
        net.remember(x.clean[:, i : i + CHUNK], x.text, grown)
    assert whole.frames == grown.frames == FRAMES
    for layer, keys in whole.keys.items():
        assert_close(grown.keys[layer], keys, rtol=0, atol=1e-5)
        assert_close(grown.values[layer], whole.values[layer], rtol=0, atol=1e-5)


def test_a_single_chunk_needs_no_memory(net, x):
    own = slice(0, CHUNK)
    with torch.no_grad():
        expected = net(x.noisy[:, own], x.t[:, own], x.text)
        nothing = net.remember(x.clean[:, :0], x.text, KVCache())
        assert_close(net.chunks(x.noisy[:, own], x.t[:, own], x.text, nothing), expected, rtol=0, atol=1e-5)
    assert nothing.frames == 0


def test_a_clean_prediction_is_the_networks_output(tiny_student, x):
    velocity, clean = (tiny_student(FRAMES, prediction=prediction).net for prediction in ("velocity", "clean"))
    t = x.t.clamp_min(0.1)
    with torch.no_grad():
        output = velocity(x.noisy, t, x.text)
        assert_close(clean_from_velocity(x.noisy, clean(x.noisy, t, x.text), t), output, rtol=0, atol=1e-4)


# Gradients.


@pytest.mark.parametrize("way", ["noisy context", "teacher forcing", "on a cache"])
def test_the_gradient_reaches_every_parameter(net, x, way):
    match way:
        case "noisy context":
            v = net(x.noisy, x.t, x.text)
        case "teacher forcing":
            v = net(x.noisy, x.t, x.text, clean=x.clean)
        case _:
            v = net.chunks(x.noisy, x.t, x.text, net.remember(x.clean, x.text, KVCache()))
    v.square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_no_gradient_flows_into_the_cache(net, x):
    x.clean.requires_grad_()
    cache = net.remember(x.clean, x.text, KVCache())
    stored = [
        *cache.keys.values(),
        *cache.values.values(),
        *(tensor for pair in cache.text.values() for tensor in pair),
    ]
    assert not any(tensor.requires_grad for tensor in stored)
    net.chunks(x.noisy, x.t, x.text, cache).sum().backward()
    assert x.clean.grad is None


def test_without_context_the_gradient_on_a_cache_is_that_of_the_plain_pass(net, x):
    own = slice(0, CHUNK)

    def gradient(v: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(v.square().mean(), list(net.parameters())))

    expected = gradient(net(x.noisy[:, own], x.t[:, own], x.text))
    cache = net.remember(x.clean, x.text, KVCache())
    for found, wanted in zip(gradient(net.chunks(x.noisy[:, own], x.t[:, own], x.text, cache)), expected, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_denoising_pass_leaves_the_cache_as_it_is(net, x):
    cache = net.remember(x.clean[:, :CHUNK], x.text, KVCache())
    before = copy.deepcopy(cache)
    net.chunk(x.noisy[:, :CHUNK], x.t[:, :CHUNK], x.text, cache)
    net.chunks(x.noisy[:, : 2 * CHUNK], x.t[:, : 2 * CHUNK], x.text, cache)
    assert cache.frames == before.frames
    assert all(torch.equal(cache.keys[layer], keys) for layer, keys in before.keys.items())
    assert all(torch.equal(cache.values[layer], values) for layer, values in before.values.items())


# The pass in progress.


def test_a_pass_that_failed_leaves_no_trace(net, x):
    with torch.no_grad():
        before = net(x.noisy, x.t, x.text)
        with pytest.raises(RuntimeError):
            net(x.noisy[:, :CHUNK], x.t[:, :CHUNK], x.text[:, :, :5])  # the text is too narrow
        assert torch.equal(net(x.noisy, x.t, x.text), before)


def test_a_copy_has_weights_of_its_own(net, x):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        before = net(x.noisy, x.t, x.text)
        assert torch.equal(twin(x.noisy, x.t, x.text), before)
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert torch.equal(net(x.noisy, x.t, x.text), before)
        assert not torch.equal(twin(x.noisy, x.t, x.text), before)


def test_a_copy_can_run_in_the_middle_of_the_originals_pass(net, x):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        before = net(x.noisy, x.t, x.text)
        shorter = x.noisy[:, :CHUNK], x.t[:, :CHUNK], x.text

        def run_the_copy(*_: object) -> None:
            twin(*shorter)

        net.transformer.blocks[0].register_forward_hook(run_the_copy)
        assert torch.equal(net(x.noisy, x.t, x.text), before)


# Its parts.


def test_rotary_axes_are_wans():
    assert CausalRope(128, []).axes == (44, 42, 42)
    assert CausalRope(24, []).axes == (8, 8, 8)


def test_the_first_token_of_frame_0_is_not_rotated():
    cos, sin = CausalRope(24, []).tables(torch.arange(2), 2, 2)
    assert cos.shape == (8, 12)
    assert torch.equal(cos[0], torch.ones(12))
    assert torch.equal(sin[0], torch.zeros(12))


def test_rotary_scores_depend_on_the_distance_of_frames_only():
    rope, generator = CausalRope(24, []), torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 24, generator=generator) for _ in range(2))

    def score(at: int, seen: int) -> torch.Tensor:
        places = [rope.tables(torch.tensor([frame]), 1, 1) for frame in (at, seen)]
        return (rotated(query, *places[0]) * rotated(key, *places[1])).sum()

    assert_close(score(7, 5), score(107, 105))
    assert not torch.isclose(score(7, 5), score(7, 4))


def test_rotation_turns_neighbouring_pairs():
    quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])  # cos, sin of 90 degrees
    assert rotated(torch.tensor([[[[3.0, 4.0]]]]), *quarter).flatten().tolist() == [-4.0, 3.0]


def test_timesteps_are_cosines_then_sines_of_falling_rates():
    embedded = ExactTimesteps(4)(torch.tensor([0.0, 1000.0]))
    assert embedded[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    phases = torch.tensor([1000.0, 10.0], dtype=torch.float64)  # rates 1 and 10,000^(-1/2)
    assert_close(embedded[1], torch.cat([phases.cos(), phases.sin()]).float())


STOCK = """
import json, sys
from diffusers import WanTransformer3DModel
net = WanTransformer3DModel.from_pretrained(sys.argv[1])
print(json.dumps({
    "class": type(net).__name__,
    "ours": [name for name in sys.modules if name.startswith("afd")],
    "sums": {name: float(value.double().sum()) for name, value in net.named_parameters()},
}))
"""


@pytest.mark.slow  # a second process imports torch and diffusers
def test_stock_diffusers_opens_a_saved_student(tiny_student, tmp_path):
    student = tiny_student()
    save_student(student, tmp_path / "student")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "student" / "transformer")]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    sums = {name: float(value.detach().double().sum()) for name, value in student.net.transformer.named_parameters()}
    assert result == {"class": "WanTransformer3DModel", "ours": [], "sums": sums}
