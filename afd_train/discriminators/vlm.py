"""Qwen2-VL (arXiv 2409.12191) with low-rank adapters and a reward head, in the manner of VideoAlign (2501.13918).

The language model reads: the video, the prompt, the instruction, and last the reward token, a learned embedding that
is no word; the head scores the clip from what becomes of it.  Attention looks back only, so that the score depends on
the prompt because that stands before.  Frames are resized and cut into patches here, as Qwen2VLVideoProcessor does,
which would take them through the CPU and needs torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLModel

from afd_data.errors import UserError
from afd_train.discriminator_config import VlmConfig
from afd_train.discriminators import Prompts, Space, evenly_spaced
from afd_train.discriminators.pretrained import (
    KEY,
    adapt,
    check_frames,
    model_folder,
    open_model,
    resized,
)

# Of CLIP, with which the vision tower was trained.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LINEAR = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
TEXT, VIDEO = 0, 2  # what Qwen2-VL calls the kinds of tokens
OPENING = "<|im_start|>user\n"  # the model was instructed in conversations


class VisionLanguage(nn.Module):
    """See `Discriminator`."""

    space: Space = "pixels"
    frames: int | None

    def __init__(self, config: VlmConfig):
        super().__init__()
        folder = model_folder(config.path, "qwen2_vl")
        self.words = Words(folder, config.instruction)
        self.trunk = open_model(Qwen2VLModel, folder, config)
        self.vision = self.trunk.config.vision_config
        check_frames(config.frames, self.vision.temporal_patch_size)
        self.config, self.frames = config, config.frames
        adapt(self.trunk, config, LINEAR)
        embedding = self.trunk.get_input_embeddings().weight
        # Starts as the mean word.  A frozen trunk's gradient would have to pass all of it to reach this one vector.
        self.reward = nn.Parameter(embedding.float().mean(0), requires_grad=config.train == "lora")
        self.head = nn.Linear(len(self.reward), 1, bias=False)

    def forward(self, clips: Tensor, prompts: Prompts, reference: Tensor | None = None) -> Tensor:
        """[B, F, 3, H, W] in [-1, 1], B prompts -> [B, 1]."""
        vision, trunk = self.vision, self.trunk
        cell = vision.patch_size * vision.spatial_merge_size
        height, width = self.config.frame_size(clips.shape[3], clips.shape[4], cell)
        frames = resized(evenly_spaced(clips, self.frames), height, width, MEAN, DEVIATION)
        sides = (height // vision.patch_size, width // vision.patch_size)
        grid = (self.frames // vision.temporal_patch_size, *sides)
        tokens = math.prod(grid) // vision.spatial_merge_size**2
        read = self.words.around_video(prompts.texts, tokens, trunk.config).to(clips.device)
        ends = torch.arange(len(clips), device=clips.device), read.mask.sum(1) - 1
        embeddings = trunk.get_input_embeddings()(read.ids)
        hidden = trunk(
            input_ids=read.ids,
            inputs_embeds=embeddings.index_put(ends, self.reward.to(embeddings.dtype)),
            attention_mask=read.mask,
            mm_token_type_ids=read.kinds,
            pixel_values_videos=patches(frames, vision),
            video_grid_thw=torch.tensor([grid] * len(clips), device=clips.device),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[ends].float())


class Reading(NamedTuple):
    """What the language model reads: token ids, 1 where there is one, and their kinds; [B, L] integers each."""

    ids: Tensor
    mask: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> Reading:
        """The same there."""
        return Reading(*(part.to(device) for part in self))


class Words:
    """The tokenizer in a model's folder.  Raises UserError where it is none."""

    def __init__(self, folder: Path, instruction: str):
        self._tokenizer = _open_tokenizer(folder)
        self._opening = self._ids(OPENING, special=True)
        self._closing = self._ids(f"\n{instruction}")

    def around_video(self, prompts: Sequence[str], video_tokens: int, about: Any) -> Reading:
        """Opening, video, prompt, instruction and a place for the reward token, filled up on the right."""
        video = [about.vision_start_token_id, *[about.video_token_id] * video_tokens, about.vision_end_token_id]
        reward = [about.vision_end_token_id]  # any id: its embedding is put in its place
        rows = [[*self._opening, *video, *self._ids(prompt), *self._closing, *reward] for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [reward[0]] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return Reading(ids, mask, torch.where(ids == about.video_token_id, VIDEO, TEXT))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        # What looks like a special token in a prompt is text: a prompt must not end the video or add another.
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]  # pyright: ignore[reportReturnType]


def patches(frames: Tensor, vision: Any) -> Tensor:
    """[B, F, 3, H, W] -> [B N, values], in Qwen2-VL's order: patches that will be merged lie next to each other."""
    sizes = {"r": vision.temporal_patch_size, "m": vision.spatial_merge_size, "p": vision.patch_size}
    order = "b (t r) c (h m p) (w n q) -> (b t h w m n) (c r p q)"
    return rearrange(frames, order, **sizes, n=sizes["m"], q=sizes["p"])


def _open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{KEY}: {folder} holds no tokenizer ({error}). Copy or download it again.") from None
