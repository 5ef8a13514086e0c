"""Folders of pre-trained networks that discriminators stand on, small enough for a test, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VJEPA2Config,
    VJEPA2Model,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
LETTERS = sorted(ByteLevel.alphabet())
VOCABULARY = {letter: index for index, letter in enumerate([*LETTERS, *SPECIAL])}


def save_vjepa2(folder: Path, **settings: Any) -> Path:
    """A V-JEPA 2 of 2 layers of width 24 on squares of 32 pixels, with its predictor; `settings` are its own."""
    small: dict[str, Any] = {
        "crop_size": 32, "patch_size": 16, "frames_per_clip": 4, "hidden_size": 24, "num_attention_heads": 2,
        "num_hidden_layers": 2, "pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 1, "initializer_range": 0.2,
    }  # fmt: skip
    config = VJEPA2Config(**(small | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        VJEPA2Model(config).save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path, **settings: Any) -> Path:
    """A Qwen2-VL of 2 + 2 layers of widths 16 and 24, as the Hub has them, and a tokenizer of letters.

    settings: of the language model.
    """
    text: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
        "bos_token_id": VOCABULARY["<|endoftext|>"], "eos_token_id": VOCABULARY["<|im_end|>"],
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text | settings,
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": settings.get("hidden_size", 24), "num_heads": 2,
            "mlp_ratio": 2, "initializer_range": 0.2,
        },
        vision_start_token_id=VOCABULARY["<|vision_start|>"],
        vision_end_token_id=VOCABULARY["<|vision_end|>"],
        video_token_id=VOCABULARY["<|video_pad|>"],
        image_token_id=299,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = Tokenizer(BPE({letter: VOCABULARY[letter] for letter in LETTERS}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert fast.get_vocab() == VOCABULARY
    fast.save_pretrained(folder)
    return folder
