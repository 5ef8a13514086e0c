"""Folders in the layout of Wan 2.1's, small enough for a test, with random weights: text encoder, tokenizer, VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from afd_data.config import VideoConfig

WORDS = ("a", "red", "green", "ball", "the", "falls", "bounces", "&", "schön")
TEXT_DIM = 32
# The recorded network of tests/data: its weights under the original's names, and what a student must say to have it.
RECORDED = Path(__file__).parent / "data" / "causal_wan" / "weights.safetensors"
RECORDED_STUDENT: dict[str, Any] = {
    "dim": 48, "heads": 2, "layers": 2, "ffn_dim": 96, "frequency_dim": 32, "text_dim": 40, "text_tokens": 12,
    "autoencoder": "wan", "chunk_frames": 3,
}  # fmt: skip
RECORDED_VIDEO = VideoConfig(width=96, height=64, frames=21, fps=8.0)


def save_text_encoder(folder: Path, seed: int = 0) -> Path:
    """text_encoder/ (UMT5, 2 layers of width 32) and tokenizer/ (unigram: some words, and letters) in `folder`."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(pieces), d_model=TEXT_DIM, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def save_vae(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An AutoencoderKLWan with Wan 2.1's strides and channels, 4 wide; `settings` are its own."""
    small: dict[str, Any] = {"base_dim": 4, "num_res_blocks": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderKLWan(**(small | settings)).save_pretrained(folder)
    return folder
