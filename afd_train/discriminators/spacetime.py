"""A small transformer over the space-time patches of a latent clip and the words of its prompt.

Its clips are latents as they come back from 8-bit video, the teacher's and the student's alike.  A lossy cache adds the
codec's traces to the teacher's side: small videos are cached lossless (`video.lossless`).

With `chunk_causal` every chunk has a readout of its own, which sees the words, the reference clip and the chunks up to
its own.  What was computed of a clip's chunks then serves all candidates for the next one (`score_branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from afd_train.discriminator_config import Space, SpaceTimeConfig
from afd_train.discriminators import Prompts
from afd_train.student_config import LatentShape, StudentConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, heads, N, d] -> [B, heads, N, d]


class SpaceTime(nn.Module):
    """See `Discriminator`.

    Tokens stand in this order: what everything may see (words, then the reference clip's), the clip's own by time, the
    readouts.
    """

    space: Space = "latents"
    frames: int | None = None

    def __init__(self, config: SpaceTimeConfig, shape: LatentShape, student: StudentConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        channels = shape.channels if config.view == "latents" else student.pixel_factor**2
        rows, columns = shape.height // config.patch, shape.width // config.patch
        steps = shape.frames // config.tubelet_frames
        self.chunks = shape.frames // student.chunk_frames if config.chunk_causal else 1
        self.chunk_tokens = steps // self.chunks * rows * columns
        patch = channels * config.patch**2 * config.tubelet_frames
        self.embed = nn.Linear((1 + config.look_back) * patch, dim)
        self.embed_text = nn.Linear(student.text_dim, dim)
        self.time = nn.Parameter(0.02 * torch.randn(steps, 1, 1, dim))
        self.place = nn.Parameter(0.02 * torch.randn(1, rows, columns, dim))
        self.readout = nn.Parameter(0.02 * torch.randn(self.chunks, dim))
        # Which of two clips a token is from.
        self.side = nn.Parameter(0.02 * torch.randn(2, dim)) if config.reference else None
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)

    def forward(self, clips: Tensor, prompts: Prompts, reference: Tensor | None = None) -> Tensor:
        """[B, F, C, h, w], B prompts, perhaps another clip for each -> [B, 1] or [B, chunks]."""
        early = self._early(prompts, reference)
        x = torch.cat([early, self._tokens(self._patches(clips)), self.readout.expand(len(clips), -1, -1)], 1)
        hidden = self._seen(early.shape[1], x.device) if self.config.chunk_causal else None
        for block in self._blocks():
            x = block(x, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, hidden))
        return self._scores(x[:, -self.chunks :])

    def score_branches(
        self, followed: Tensor, candidates: Tensor, prompts: Prompts, reference: Tensor | None = None
    ) -> Tensor:
        """What chunk k would score were it that of a candidate, behind the chunks before k that were followed.

        followed: [P, F, C, h, w]; candidates: [P, M, F, C, h, w]; P prompts -> [P, M, chunks].
        """
        count, many = candidates.shape[:2]
        early = self._early(prompts, reference)
        seen = early.shape[1]
        patches = self._patches(followed)
        x = torch.cat([early, self._tokens(patches)], 1)
        allowed = self._seen(seen, x.device)[: x.shape[1], : x.shape[1]]
        y = self._tokens(self._patches(candidates.flatten(0, 1), patches.repeat_interleave(many, 0)))
        # [P, chunks, M (tokens of a chunk and its readout), D]
        y = rearrange(y, "(p m) (k n) d -> p k m n d", m=many, k=self.chunks)
        readout = self.readout[:, None, None].expand(count, -1, many, 1, -1)
        y = torch.cat([y, readout], 3).flatten(2, 3)
        group = torch.arange(many, device=y.device).repeat_interleave(self.chunk_tokens + 1)
        own = group[:, None] == group[None, :]
        is_readout = torch.arange(len(group), device=y.device) % (self.chunk_tokens + 1) == self.chunk_tokens
        own &= ~is_readout[None, :] | torch.eye(len(group), dtype=torch.bool, device=y.device)
        for block in self._blocks():
            query, key, value = block.projected(x)
            y = torch.stack(
                [
                    block(y[:, k], self._behind(key, value, seen + k * self.chunk_tokens, own))
                    for k in range(self.chunks)
                ],
                1,
            )
            x = block.finished(x, F.scaled_dot_product_attention(query, key, value, allowed))
        scores = self._scores(y[:, :, is_readout].flatten(0, 1))
        return rearrange(scores, "(p k) m -> p m k", p=count)

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @staticmethod
    def _behind(key: Tensor, value: Tensor, before: int, own: Tensor) -> Attend:
        """Attention of the candidates for a chunk to what came before it, and each to itself."""
        allowed = torch.cat([own.new_ones(len(own), before), own], 1)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = torch.cat([key[:, :, :before], k], 2), torch.cat([value[:, :, :before], v], 2)
            return F.scaled_dot_product_attention(q, keys, values, allowed)

        return attend

    def _early(self, prompts: Prompts, reference: Tensor | None) -> Tensor:
        words = self.embed_text(prompts.embeddings)
        if self.side is None:
            return words
        assert reference is not None
        return torch.cat([words, self._tokens(self._patches(reference), 1)], 1)

    def _seen(self, early: int, device: torch.device) -> Tensor:
        """Which token may look at which, bool [N, N]: a chunk sees what is no later; a readout is seen by itself."""
        of_clip = torch.arange(self.chunks, device=device).repeat_interleave(self.chunk_tokens)
        readouts = torch.arange(self.chunks, device=device)
        when = torch.cat([torch.full((early,), -1, device=device), of_clip, readouts])
        seen = when[None, :] <= when[:, None]
        seen[:, -self.chunks :] = torch.eye(len(when), dtype=torch.bool, device=device)[:, -self.chunks :]
        return seen

    def _patches(self, clips: Tensor, behind: Tensor | None = None) -> Tensor:
        """[B, F, C, h, w] -> [B, steps, rows, columns, values of a token].

        With `look_back` a token also holds the place's patch a step before, the first its own again; `behind`: patches
        of the clips whose chunks come before these clips' chunks.
        """
        sizes = {"p": self.config.patch, "q": self.config.patch, "r": self.config.tubelet_frames}
        patches = rearrange(self._viewed(clips), "b (f r) c (h p) (w q) -> b f h w (r c p q)", **sizes)
        if not self.config.look_back:
            return patches
        before = torch.cat([patches[:, :1], patches[:, :-1]], 1)
        if behind is not None:
            first = slice(patches.shape[1] // self.chunks, None, patches.shape[1] // self.chunks)
            own = behind[..., : patches.shape[-1]]
            before[:, first] = torch.cat([own[:, :1], own[:, :-1]], 1)[:, first]
        return torch.cat([patches, before], -1)

    def _tokens(self, patches: Tensor, side: int = 0) -> Tensor:
        tokens = (self.embed(patches) + self.time + self.place).flatten(1, 3)
        return tokens if self.side is None else tokens + self.side[side]

    def _scores(self, readouts: Tensor) -> Tensor:
        return self.score(self.norm(readouts)).squeeze(-1)

    def _viewed(self, clips: Tensor) -> Tensor:
        """[B, F, C, h, w] -> what it looks at; a view without colour has a channel a pixel of a cell."""
        if self.config.view == "latents":
            return clips
        light = reduce(clips, "b f (c s) h w -> b f s h w", "mean", c=3)
        if self.config.view == "luminance-differences":
            # The first frame has none before it: it is its own neighbour, and the count of frames stays.
            light = torch.diff(light, dim=1, prepend=light[:, :1])
        scale = light.square().mean((1, 2, 3, 4), keepdim=True).sqrt()
        return light / (scale + 1e-3)


class Block(nn.Module):
    """A pre-norm transformer block whose attention is given by the caller."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.finished(x, attend(*self.projected(x)))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, heads, N, d] each."""
        query, key, value = rearrange(self.qkv(self.norm1(x)), "b n (s h d) -> s b h n d", s=3, h=self.heads)
        return query, key, value

    def finished(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output, given that of its attention."""
        x = x + self.out(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))
