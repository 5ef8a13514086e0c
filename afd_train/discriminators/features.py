"""The starting student's own features of a clip, frozen, and a small head.

The features are those of one block-causal pass at a small noise level, with no noise drawn: (1 - t) x the clip.  So
they are the same for the same clip, and a chunk's depend on it and the chunks before it.  Teacher forcing would show
a chunk its past entirely clean, for twice the tokens; at a small t the two hardly differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd_data.errors import UserError
from afd_train.discriminator_config import FeaturesConfig
from afd_train.discriminators import Prompts, Space
from afd_train.discriminators.head import PromptedHead
from afd_train.flow import noised
from afd_train.parallel import whole
from afd_train.policies import plain_state
from afd_train.students import Student, causal_net, new_transformer
from afd_train.students.causal_wan import CausalWan


class Features(nn.Module):
    """See `Discriminator`.  `student` has its starting weights; they are copied, adapters left out."""

    space: Space = "latents"
    frames: int | None = None

    def __init__(self, config: FeaturesConfig, student: Student):
        super().__init__()
        layers = student.config.layers
        blocks = config.blocks_of(layers)
        if blocks[-1] >= layers:
            raise UserError(
                f"discriminator.blocks: {blocks[-1]}, but the student has {layers} blocks (0 to {layers - 1}). "
                "Name some of these, or leave the key out."
            )
        self.time = config.time
        self.trunk = starting_trunk(student, blocks[-1] + 1)
        self._seen: list[Tensor] = []
        for block in blocks:
            self.trunk.transformer.blocks[block].register_forward_hook(self._see)
        width = len(blocks) * student.config.dim
        self.head = PromptedHead(student.shape.frames, width, student.config.text_dim, config.dim)

    def forward(self, clips: Tensor, prompts: Prompts, reference: Tensor | None = None) -> Tensor:
        """[B, F, C, h, w], B prompts -> [B, 1]."""
        t = torch.full(clips.shape[:2], self.time, device=clips.device)
        self._seen.clear()
        try:
            self.trunk(noised(clips, torch.zeros_like(clips), t), t, prompts.embeddings)
            # Of blocks that lie far apart, whose sizes differ by much.
            features = torch.cat([F.layer_norm(seen.float(), seen.shape[-1:]) for seen in self._seen], -1)
        finally:
            self._seen.clear()
        return self.head(features.unflatten(0, clips.shape[:2]), prompts.embeddings)

    def _see(self, block: nn.Module, given: Any, output: Tensor) -> None:
        self._seen.append(output)


def starting_trunk(student: Student, layers: int) -> CausalWan:
    """A frozen copy of the student's first blocks, adapters left out and all of it on every process."""
    config = student.config.model_copy(update={"layers": layers})
    with torch.device("meta"):
        transformer = new_transformer(config)
    weights = plain_state(student.net)
    copies = {name: whole(weights[name]).detach().clone() for name in transformer.state_dict()}
    transformer.load_state_dict(copies, assign=True)
    return causal_net(transformer, config).requires_grad_(False).eval()
