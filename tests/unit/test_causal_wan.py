"""The causal network: what a frame may see, and that all ways to run it agree."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from afd_train.flow import clean_from_velocity
from afd_train.students.attention import KVCache, rotary_table, rotated
from afd_train.students.causal_wan import CausalWan, ExactTimesteps, cast_weights
from afd_train.students.folder import save_student
from tests.dense_wan import oracle_of, stirred

B, FRAMES, CHUNK = 2, 6, 2
CPU = torch.device("cpu")
WINDOWS = [(None, 0), (4, 0), (4, 1), (5, 2)]


class Inputs:
    """A noisy and a clean clip, a time for every chunk, and a text."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.noisy = torch.randn(B, FRAMES, 48, 4, 4, generator=generator)
        self.clean = torch.randn(B, FRAMES, 48, 4, 4, generator=generator)
        self.text = torch.randn(B, 6, 16, generator=generator)
        # 1000 t has no rounding error: the oracle would see it.
        self.t = torch.randint(1, 128, (B, FRAMES // CHUNK), generator=generator).repeat_interleave(CHUNK, 1) / 128
        self.target = torch.randn(self.noisy.shape, generator=generator)


@pytest.fixture
def net(tiny_student) -> CausalWan:
    return stirred(tiny_student(FRAMES).net)


@pytest.fixture
def x() -> Inputs:
    return Inputs()


def changed(clips: Tensor, frame: int) -> Tensor:
    """The same up to `frame`, other numbers from there on."""
    clips = clips.clone()
    clips[:, frame:] += 1
    return clips


def remembered(net: CausalWan, x: Inputs) -> KVCache:
    """A cache of the whole clean clip."""
    return net.remember(x.clean, x.text, net.memory(FRAMES))


def own(start: int) -> slice:
    """The frames of a chunk."""
    return slice(start, start + CHUNK)


# What a frame may see.


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


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_both_forward_passes_equal_dense_masks(tiny_student, x, window, sink):
    net = stirred(tiny_student(FRAMES, window=window, sink=sink).net)
    oracle, clean_t = oracle_of(net, window, sink), x.t.flip(1) / 10
    with torch.no_grad():
        assert_equal(net(x.noisy, x.t, x.text), oracle.noisy_context(x.noisy, x.t, x.text))
        expected = oracle.clean_context(x.noisy, x.t, x.text, x.clean, clean_t)
        assert_equal(net(x.noisy, x.t, x.text, x.clean, clean_t), expected)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert_close(found.double(), expected.double(), rtol=0, atol=1e-5)


def chunk_by_chunk(net: CausalWan, x: Inputs) -> Tensor:
    cache, out = net.memory(FRAMES), []
    for i in range(0, FRAMES, CHUNK):
        out.append(net.chunk(x.noisy[:, own(i)], x.t[:, own(i)], x.text, cache))
        net.remember(x.clean[:, own(i)], x.text, cache)
    return torch.cat(out, 1)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_chunks_on_a_cache_equal_teacher_forcing(tiny_student, x, prediction, window, sink):
    net = stirred(tiny_student(FRAMES, prediction=prediction, window=window, sink=sink).net)
    x.t = x.t.clamp_min(0.5)
    with torch.no_grad():
        expected = net(x.noisy, x.t, x.text, clean=x.clean)
        assert_equal(chunk_by_chunk(net, x), expected)
        assert_equal(net.chunks(x.noisy, x.t, x.text, remembered(net, x)), expected)
        enough = net.remember(x.clean[:, :-CHUNK], x.text, net.memory(FRAMES - CHUNK))
        assert_equal(net.chunks(x.noisy, x.t, x.text, enough), expected)


def test_too_short_a_cache_is_refused(net, x):
    cache = net.remember(x.clean[:, :CHUNK], x.text, net.memory(FRAMES))
    with pytest.raises(AssertionError):
        net.chunks(x.noisy, x.t, x.text, cache)


def test_chunks_from_a_frame_on_are_a_part_of_all_chunks(net, x):
    with torch.no_grad():
        expected = net.chunks(x.noisy, x.t, x.text, remembered(net, x))[:, CHUNK:]
        cache = net.remember(x.clean[:, :-CHUNK], x.text, net.memory(FRAMES))
        assert_equal(net.chunks(x.noisy[:, CHUNK:], x.t[:, CHUNK:], x.text, cache, first=CHUNK), expected)


@pytest.mark.parametrize(("window", "sink"), WINDOWS)
def test_remembering_all_at_once_equals_chunk_after_chunk(tiny_student, x, window, sink):
    net = stirred(tiny_student(FRAMES, window=window, sink=sink).net)
    whole, grown = remembered(net, x), net.memory(FRAMES)
    for i in range(0, FRAMES, CHUNK):
        net.remember(x.clean[:, own(i)], x.text, grown)
    assert whole.frames == grown.frames == FRAMES
    for layer, keys in whole.keys.items():
        assert_equal(grown.keys[layer], keys)
        assert_equal(grown.values[layer], whole.values[layer])


def test_a_ring_keeps_the_sink_and_the_latest_frames(tiny_student, x):
    net = stirred(tiny_student(FRAMES, window=5, sink=2).net)
    tokens, whole = 4, remembered(net, x)
    ring = net.remember(x.clean, x.text, net.memory(5))
    assert [ring.slot(frame) for frame in range(8)] == [0, 1, 2, 3, 4, 2, 3, 4]
    for layer, keys in whole.keys.items():
        frames = keys.unflatten(1, (FRAMES, tokens))
        assert_equal(ring.keys[layer].unflatten(1, (5, tokens)), frames[:, [0, 1, 5, 3, 4]])


def test_an_image_may_be_remembered_as_a_chunk_of_one_frame(net, x):
    cache = net.remember(x.clean[:, :1], x.text, net.memory(1 + CHUNK))
    oracle, noisy = oracle_of(net), torch.cat([x.clean[:, :1], x.noisy[:, :CHUNK]], 1)
    t = torch.cat([torch.zeros(B, 1), x.t[:, :CHUNK]], 1)
    with torch.no_grad():
        expected = oracle.clean_context(noisy, t, x.text, noisy, torch.zeros_like(t), given=1)[:, 1:]
        assert_equal(net.chunk(x.noisy[:, :CHUNK], x.t[:, :CHUNK], x.text, cache), expected)


def test_a_single_chunk_needs_no_memory(net, x):
    with torch.no_grad():
        expected = net(x.noisy[:, own(0)], x.t[:, own(0)], x.text)
        nothing = net.remember(x.clean[:, :0], x.text, net.memory(0))
        assert_equal(net.chunks(x.noisy[:, own(0)], x.t[:, own(0)], x.text, nothing), expected)
    assert nothing.frames == 0


def test_a_clean_prediction_is_the_networks_output(tiny_student, x):
    velocity, clean = (tiny_student(FRAMES, prediction=prediction).net for prediction in ("velocity", "clean"))
    t = x.t.clamp_min(0.1)
    with torch.no_grad():
        output = velocity(x.noisy, t, x.text)
        assert_close(clean_from_velocity(x.noisy, clean(x.noisy, t, x.text), t), output, rtol=0, atol=1e-4)


def test_a_text_may_serve_a_group_of_clips(net, x):
    repeated = x.text[:1].expand(B, -1, -1)
    with torch.no_grad():
        expected = net(x.noisy, x.t, repeated, clean=x.clean)
        assert_equal(net(x.noisy, x.t, x.text[:1], clean=x.clean), expected)
        cache = net.remember(x.clean, x.text[:1], net.memory(FRAMES))
        assert_equal(net.chunks(x.noisy, x.t, x.text[:1], cache), expected)
    assert all(keys.shape[0] == 1 for keys, _ in cache.text.values())


def test_groups_of_clips_stand_next_to_each_other(net, x):
    clips, t = x.noisy.repeat_interleave(2, 0), x.t.repeat_interleave(2, 0)
    with torch.no_grad():
        assert_equal(net(clips, t, x.text), net(x.noisy, x.t, x.text).repeat_interleave(2, 0))


# Gradients.


def gradient(net: CausalWan, *losses: Tensor) -> Tensor:
    """Of all parameters, one after the other, summed over losses that are backpropagated one by one."""
    net.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("way", ["noisy context", "teacher forcing", "on a cache"])
def test_the_gradient_reaches_every_parameter(net, x, way):
    match way:
        case "noisy context":
            v = net(x.noisy, x.t, x.text)
        case "teacher forcing":
            v = net(x.noisy, x.t, x.text, clean=x.clean)
        case _:
            v = net.chunks(x.noisy, x.t, x.text, remembered(net, x))
    v.square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_no_gradient_flows_into_the_cache(net, x):
    x.clean.requires_grad_()
    cache = remembered(net, x)
    stored = [
        *cache.keys.values(),
        *cache.values.values(),
        *(tensor for pair in cache.text.values() for tensor in pair),
    ]
    assert not any(tensor.requires_grad for tensor in stored)
    net.chunks(x.noisy, x.t, x.text, cache).sum().backward()
    assert x.clean.grad is None


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (5, 2)])
@pytest.mark.parametrize("detached", [False, True], ids=["teacher forcing", "detached context"])
def test_the_gradient_equals_that_of_a_dense_mask(tiny_student, x, window, sink, detached):
    net = stirred(tiny_student(FRAMES, window=window, sink=sink).net)
    oracle = oracle_of(net, window, sink)
    expected_v = oracle.clean_context(x.noisy, x.t, x.text, x.clean, torch.zeros_like(x.t), detached=detached)
    F.mse_loss(expected_v, x.target.double()).backward()
    gradients = [value.grad for value in oracle.weights.values()]
    expected = torch.cat([g.flatten() for g in gradients if g is not None])
    if detached:
        v = net.chunks(x.noisy, x.t, x.text, remembered(net, x))
    else:
        v = net(x.noisy, x.t, x.text, clean=x.clean)
    assert_same_gradient(gradient(net, F.mse_loss(v, x.target)).double(), expected)


def test_backward_passes_chunk_by_chunk_sum_to_that_of_all_chunks(net, x):
    cache = remembered(net, x)
    expected = gradient(net, F.mse_loss(net.chunks(x.noisy, x.t, x.text, cache), x.target))
    share = CHUNK / FRAMES
    losses = (
        F.mse_loss(net.chunks(x.noisy[:, own(i)], x.t[:, own(i)], x.text, cache, first=i), x.target[:, own(i)]) * share
        for i in range(0, FRAMES, CHUNK)
    )
    assert_same_gradient(gradient(net, *losses), expected)


def test_backward_passes_on_a_growing_cache_give_the_same_gradient(net, x):
    cache = remembered(net, x)
    expected = gradient(net, F.mse_loss(net.chunks(x.noisy, x.t, x.text, cache), x.target))
    grown = net.memory(FRAMES)
    losses = []
    for i in range(0, FRAMES, CHUNK):
        v = net.chunks(x.noisy[:, own(i)], x.t[:, own(i)], x.text, grown, first=i)
        losses.append(F.mse_loss(v, x.target[:, own(i)]) * CHUNK / FRAMES)
        net.remember(x.clean[:, own(i)], x.text, grown)
    assert_same_gradient(gradient(net, *losses), expected)


@pytest.mark.parametrize("way", ["teacher forcing", "on a cache", "on a cache, the last two chunks"])
def test_copies_equal_separate_passes_in_value_and_gradient(net, x, way):
    start = CHUNK if "last" in way else 0
    noisy = [x.noisy[:, start:], x.target[:, start:], x.noisy.flip(1)[:, start:]]
    times = [x.t[:, start:], x.t[:, start:] / 2, 1 - x.t[:, start:]]
    cache = remembered(net, x)

    def run(noisy: Tensor, t: Tensor, copies: int) -> Tensor:
        if way == "teacher forcing":
            return net(noisy, t, x.text, clean=x.clean)
        return net.chunks(noisy, t, x.text, cache, first=start, copies=copies)

    separate = [run(*each, 1) for each in zip(noisy, times, strict=True)]
    together = run(torch.cat(noisy, 1), torch.cat(times, 1), 3)
    assert_equal(together, torch.cat(separate, 1))
    expected = gradient(net, *(v.square().mean() for v in separate))
    assert_same_gradient(gradient(net, 3 * together.square().mean()), expected)


@pytest.mark.parametrize("way", ["noisy context", "teacher forcing", "on a cache"])
def test_gradient_checkpointing_changes_no_bit(net, x, way):
    def run() -> Tensor:
        match way:
            case "noisy context":
                return net(x.noisy, x.t, x.text)
            case "teacher forcing":
                return net(x.noisy, x.t, x.text, clean=x.clean)
            case _:
                return net.chunks(x.noisy, x.t, x.text, remembered(net, x))

    expected = run()
    wanted = gradient(net, F.mse_loss(expected, x.target))
    net.transformer.enable_gradient_checkpointing()
    found = run()
    assert torch.equal(found, expected)
    assert torch.equal(gradient(net, F.mse_loss(found, x.target)), wanted)


def test_checkpointed_chunks_may_be_backpropagated_after_other_passes(net, x):
    # Blocks run again in the backward pass, when the pass in progress has long been another one.
    net.transformer.enable_gradient_checkpointing()
    cache = remembered(net, x)
    expected = gradient(net, F.mse_loss(net.chunks(x.noisy, x.t, x.text, cache), x.target))
    loss = F.mse_loss(net.chunks(x.noisy, x.t, x.text, cache), x.target)
    other = net(x.noisy[:1, :CHUNK], x.t[:1, :CHUNK], x.text[:1]).sum()
    assert torch.equal(gradient(net, loss), expected)
    other.backward()


def test_without_context_the_gradient_on_a_cache_is_that_of_the_plain_pass(net, x):
    expected = gradient(net, net(x.noisy[:, own(0)], x.t[:, own(0)], x.text).square().mean())
    v = net.chunks(x.noisy[:, own(0)], x.t[:, own(0)], x.text, remembered(net, x))
    assert_same_gradient(gradient(net, v.square().mean()), expected)


def test_a_denoising_pass_leaves_the_remembered_frames_as_they_are(net, x):
    cache, tokens = net.remember(x.clean[:, :CHUNK], x.text, net.memory(FRAMES)), 4
    before = copy.deepcopy(cache)
    net.chunk(x.noisy[:, :CHUNK], x.t[:, :CHUNK], x.text, cache)
    net.chunks(x.noisy[:, : 2 * CHUNK], x.t[:, : 2 * CHUNK], x.text, cache)
    assert cache.frames == before.frames
    kept = slice(CHUNK * tokens)
    assert all(torch.equal(cache.keys[layer][:, kept], keys[:, kept]) for layer, keys in before.keys.items())
    assert all(torch.equal(cache.values[layer][:, kept], value[:, kept]) for layer, value in before.values.items())


# Precision.


def test_bfloat16_keeps_norms_modulation_and_time_in_float32(net):
    cast_weights(net.transformer, torch.bfloat16)
    exact = {name for name, p in net.transformer.named_parameters() if p.dtype == torch.float32}
    block = ["scale_shift_table", "norm2.weight", "norm2.bias"]
    time = [f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert exact == {
        "scale_shift_table",
        *(f"blocks.{layer}.{name}" for layer in range(2) for name in block),
        *(f"condition_embedder.time_embedder.{name}" for name in time),
    }


def test_bfloat16_stays_within_two_percent(net, x):
    rounded = copy.deepcopy(net)
    cast_weights(rounded.transformer, torch.bfloat16)
    with torch.no_grad():
        expected, found = (each(x.noisy, x.t, x.text, clean=x.clean) for each in (net, rounded))
        cached = rounded.chunks(x.noisy, x.t, x.text, remembered(rounded, x))
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.02
    assert 0 < float((cached - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.02


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


def test_rotary_rates_split_a_head_as_wan_does():
    # A head of 128: 44 for time, 42 each for height and width, so pairs 22 and 43 begin the second and third axis.
    # Tokens (frame, row, column): 000, 001, 010, 011, 100, ...
    turned = rotary_table((0, 1), 2, 2, 128, CPU).angle()
    assert (turned[4] > 0).tolist() == [True] * 22 + [False] * 42
    assert (turned[2] > 0).tolist() == [False] * 22 + [True] * 21 + [False] * 21
    assert (turned[1] > 0).tolist() == [False] * 43 + [True] * 21
    assert_close(turned[7, [0, 1, 22, 23]], torch.tensor([1, 10_000 ** (-2 / 44), 1, 10_000 ** (-2 / 42)]))


def test_the_first_token_of_frame_0_is_not_rotated():
    turn = rotary_table((0, 1), 2, 2, 24, CPU)
    assert turn.shape == (8, 12)
    assert torch.equal(turn[0], torch.ones(12, dtype=torch.complex64))


def test_rotary_scores_depend_on_the_distance_of_frames_only():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 24, generator=generator) for _ in range(2))

    def score(at: int, seen: int) -> Tensor:
        places = [rotary_table((frame,), 1, 1, 24, CPU) for frame in (at, seen)]
        return (rotated(query, places[0]) * rotated(key, places[1])).sum()

    assert_close(score(7, 5), score(107, 105))
    assert not torch.isclose(score(7, 5), score(7, 4))


def test_rotation_turns_neighbouring_pairs():
    quarter = torch.tensor([[1j]])
    assert rotated(torch.tensor([[[[3.0, 4.0]]]]), quarter).flatten().tolist() == [-4.0, 3.0]


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
