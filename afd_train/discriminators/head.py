"""A small head that scores a clip from features of its frames and the words of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 4
QUERIES = 4


class PromptedHead(nn.Module):
    """Learned queries that look at the prompt's words, then, knowing these, at the clip's tokens.

    frames: of the features, each of which has a place in time of its own; width: of a feature; dim: of the head, a
    multiple of HEADS.
    """

    def __init__(self, frames: int, width: int, text_dim: int, dim: int):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(QUERIES, dim))
        self.time = nn.Parameter(0.02 * torch.randn(frames, 1, dim))
        self.embed = nn.Linear(width, dim)
        self.embed_text = nn.Linear(text_dim, dim)
        self.words = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.clip = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.before = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.score = nn.Sequential(nn.Linear(QUERIES * dim, dim), nn.GELU(), nn.Linear(dim, 1))

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """[B, frames, N, width], [B, L, text_dim] with zeros after a prompt's last word -> [B, 1], float32."""
        tokens = (self.embed(features.float()) + self.time).flatten(1, 2)
        padding = ~words.any(2)
        padding[:, 0] = False  # an empty prompt has words too
        queries = self.queries.expand(len(tokens), -1, -1)
        text = self.embed_text(words)
        queries = queries + self._look(self.words, self.before[0](queries), text, padding)
        queries = queries + self._look(self.clip, self.before[1](queries), tokens)
        return self.score(self.before[2](queries).flatten(1))

    @staticmethod
    def _look(attention: nn.Module, queries: Tensor, at: Tensor, hidden: Tensor | None = None) -> Tensor:
        return attention(queries, at, at, key_padding_mask=hidden, need_weights=False)[0]
