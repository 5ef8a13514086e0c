"""Names of Wan's weights: the original code's <-> diffusers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from afd_train.student_config import StudentConfig
from afd_train.students import new_transformer
from afd_train.students.keys import layout_of, listed, to_diffusers, to_original

ORIGINAL = Path(__file__).parents[1] / "data" / "causal_wan" / "weights.safetensors"


def parameters_of_wan(dim: int, ffn: int, layers: int) -> int:
    """From the architecture: 16 latent channels in patches of 4, text of 4096, times of 256 sinusoids."""
    linear = lambda size_in, size_out: size_in * size_out + size_out  # noqa: E731
    block = 8 * linear(dim, dim) + 4 * dim + 2 * dim + linear(dim, ffn) + linear(ffn, dim) + 6 * dim
    ends = linear(64, dim) + linear(dim, 64) + 2 * dim
    text, time = linear(4096, dim) + linear(dim, dim), linear(256, dim) + linear(dim, dim) + linear(dim, 6 * dim)
    return layers * block + ends + text + time


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"),
    [("1.3B", 825, 1_418_996_800), ("14B", 1095, parameters_of_wan(5120, 13824, 40))],
)
def test_every_name_of_a_released_size_goes_there_and_back(size, tensors, parameters):
    with torch.device("meta"):
        state = new_transformer(StudentConfig(size=size, autoencoder="wan")).state_dict()
    original = to_original(state)
    assert len(original) == tensors
    assert sum(value.numel() for value in original.values()) == parameters
    assert {name: id(value) for name, value in to_diffusers(original).items()} == {
        name: id(value) for name, value in state.items()
    }


def test_the_formula_for_parameters_gives_the_known_number():
    assert parameters_of_wan(1536, 8960, 30) == 1_418_996_800


def test_the_map_is_the_one_of_diffusers():
    ours, theirs = to_diffusers(load_file(ORIGINAL)), convert_wan_transformer_to_diffusers(load_file(ORIGINAL))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_original_weights_come_back_bit_for_bit_in_their_order():
    state = load_file(ORIGINAL)
    names = list(state)
    back = to_original(to_diffusers(state))
    assert list(back) == names == list(state)
    assert all(back[name] is state[name] for name in names)


def test_the_third_norm_is_the_second_of_diffusers():
    assert list(to_diffusers({"blocks.7.norm3.bias": torch.zeros(1)})) == ["blocks.7.norm2.bias"]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.norm2.weight",
        "blocks.00.norm3.weight",
        "blocks.-1.norm3.weight",
        "blocks.0.self_attn.norm_q.bias",
        "blocks.0.cross_attn.k_img.weight",
        "blocks.0.head.head.weight",
        "norm3.weight",
        "head.head.weight\n",
        "model.head.head.weight",
        "",
    ],
)
def test_an_unknown_name_is_named(name):
    with pytest.raises(ValueError, match=r"^1 of 2 names are unknown to original Wan: ") as error:
        to_diffusers({"head.head.weight": torch.zeros(1), name: torch.zeros(1)})
    assert str(error.value).endswith(name)


def test_names_of_one_layout_are_unknown_to_the_other():
    state = load_file(ORIGINAL)
    with pytest.raises(ValueError, match="of 69 names are unknown to diffusers Wan"):
        to_original(state)
    with pytest.raises(ValueError, match="of 69 names are unknown to original Wan"):
        to_diffusers(to_diffusers(state))


def test_the_layout_is_recognised():
    state = load_file(ORIGINAL)
    assert layout_of(state) == "original"
    assert layout_of(to_diffusers(state)) == "diffusers"
    assert layout_of([*to_diffusers(state), "extra"]) == "diffusers"


@pytest.mark.parametrize(("names", "said"), [([], "nothing in it"), (["a", "b"], "a, b")])
def test_names_of_something_else_are_no_layout(names, said):
    with pytest.raises(ValueError, match=f"not the weights of a Wan transformer: {said}"):
        layout_of(names)


def test_a_list_of_names_is_cut_after_five():
    assert listed("abcde") == "a, b, c, d, e"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
