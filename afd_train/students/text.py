"""Prompts -> embeddings.  `HashedWords` is the weight-free stand-in for a text encoder in small worlds.

Knows nothing of students and videos; `afd_train.conditioning.CachedText` keeps what costs much.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from afd_train.student_config import StudentConfig

_WORD = re.compile(r"[^\W_]+")


class TextEncoder(Protocol):
    """What turns prompts into the tokens that a student attends to.  No method computes gradients."""

    tokens: int
    dim: int
    dtype: torch.dtype  # that the embeddings were computed in and lose nothing in

    @property
    def identity(self) -> str:
        """Names the function that `encode` is, for folders of cached embeddings."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B] texts -> float32 [B, tokens, dim] on the CPU, zeros after a prompt's last token.

        A prompt's embedding does not depend on the others.
        """
        ...

    def release(self) -> None:
        """Drop the weights from memory; they are loaded again when they are needed."""
        ...


def open_text_encoder(config: StudentConfig) -> TextEncoder:
    """The text encoder that `student.text_encoder` names.  Reads nothing yet."""
    match config.text_encoder:
        case "hashed-words":
            return HashedWords(config)
        case "umt5":
            from afd_train.students.umt5 import Umt5

            return Umt5(config)


class HashedWords:
    """Each word is a fixed random direction that follows from its SHA-256, beside a sinusoid of its position.

    Unseen words get a direction too, so any prompt is legal; only seen words mean something to a student.
    """

    def __init__(self, config: StudentConfig):
        self.tokens = config.text_tokens
        self.dim = config.text_dim
        self.dtype = torch.float32
        self.identity = f"hashed-words-{self.tokens}x{self.dim}"

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B] texts -> [B, text_tokens, text_dim]; longer prompts are cut, shorter ones padded with zeros."""
        out = torch.zeros(len(prompts), self.tokens, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            for position, word in enumerate(_WORD.findall(prompt.lower())[: self.tokens]):
                row[position] = _word_vector(word, position, self.dim)
        return out

    def release(self) -> None:
        """There are no weights."""


@lru_cache(maxsize=65536)
def _word_vector(word: str, position: int, dim: int) -> Tensor:
    place = dim // 8 * 2  # a quarter of the vector says where the word stands
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
    meaning = torch.randn(dim - place, generator=torch.Generator().manual_seed(seed))
    rates = torch.exp(-math.log(1000) * torch.arange(place // 2) / max(place // 2, 1))
    return torch.cat([meaning, (position * rates).sin(), (position * rates).cos()])
