"""Hashed words: any prompt becomes vectors, with no vocabulary."""

import hashlib

import pytest
import torch

from afd_train.student_config import StudentConfig
from afd_train.students.text import HashedWords, open_text_encoder

WORDS = HashedWords(StudentConfig(text_tokens=5, text_dim=16))
MEANING = 16 - 4  # numbers of a vector that say which word; the other quarter says where it stands


def test_the_same_prompt_has_the_same_vectors():
    assert torch.equal(WORDS.encode(["a red ball"]), WORDS.encode(["a red ball"]))


def test_a_word_means_the_same_wherever_it_stands():
    found = WORDS.encode(["ball red", "red ball"])
    assert torch.equal(found[0, 0, :MEANING], found[1, 1, :MEANING])
    assert not torch.equal(found[0, 0, MEANING:], found[1, 1, MEANING:])


def test_a_place_means_the_same_whatever_the_word():
    found = WORDS.encode(["ball red", "red ball"])
    assert torch.equal(found[0, :, MEANING:], found[1, :, MEANING:])


def test_case_and_punctuation_do_not_count():
    assert torch.equal(WORDS.encode(["A red, BALL!"]), WORDS.encode(["a red ball"]))


def test_different_words_have_different_vectors():
    found = WORDS.encode(["red", "green"])
    assert not torch.equal(found[0, 0, :MEANING], found[1, 0, :MEANING])


def test_short_prompts_are_padded_with_zeros_and_long_ones_cut():
    found = WORDS.encode(["one two", "one two three four five six seven"])
    assert found.shape == (2, 5, 16)
    assert torch.equal(found[0, 2:], torch.zeros(3, 16))
    assert (found[1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("prompt", ["", "?!", "球が落ちる", "мяч падает", "x" * 5000])
def test_any_text_is_legal(prompt):
    assert WORDS.encode([prompt]).isfinite().all()


def test_a_words_direction_follows_from_its_sha256():
    # Python's own hash differs from process to process; this must not.
    seed = int.from_bytes(hashlib.sha256(b"red").digest()[:7], "big")
    direction = torch.randn(MEANING, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(WORDS.encode(["Red"])[0, 0, :MEANING], direction)


def test_settings_that_change_vectors_change_the_identity():
    settings: list[dict] = [{"text_tokens": 5}, {"text_tokens": 6}, {"text_dim": 16}]
    assert len({HashedWords(StudentConfig(**each)).identity for each in settings}) == 3


def test_the_recipe_says_which_encoder_it_is():
    assert type(open_text_encoder(StudentConfig())).__name__ == "HashedWords"
    assert type(open_text_encoder(StudentConfig(text_encoder="umt5"))).__name__ == "Umt5"
