"""Wan 2.1's text encoder: UMT5, prompts cleaned as diffusers cleans them.

Source of the recipe (cleaning, mask, padding): diffusers' `WanPipeline.encode_prompt`, whose default length is another.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ftfy
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from afd_data.errors import UserError
from afd_train.hub import local_path
from afd_train.student_config import StudentConfig
from afd_train.students.frozen import contents_sha256, free_memory

_KEY = "student.text_encoder_path"
_TIED = ("shared.weight", "encoder.embed_tokens.weight")


class _Folders(NamedTuple):
    encoder: Path
    tokenizer: Path


class _Loaded(NamedTuple):
    encoder: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase


class Umt5:
    """UMT5's last hidden state; rows after a prompt's last token are zero, and the students attend to those too.

    Prompts are encoded one by one: an embedding then does not depend on its batch, and the 512 tokens of one prompt are
    work enough for a GPU.  `device`: a GPU if there is one.

    Methods raise UserError: no such folder, not a UMT5, damaged, no tokenizer, another width than student.text_dim.
    """

    def __init__(
        self, config: StudentConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None
    ):
        self.tokens, self.dim, self.dtype = config.text_tokens, config.text_dim, dtype
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._source = config.text_encoder_path.rstrip("/")
        self._loaded: _Loaded | None = None

    @property
    def identity(self) -> str:
        """Hash of weights, configuration and tokenizer, with the length and the dtype that they are used with."""
        encoder = contents_sha256(self._folders.encoder, ("config.json", "*.safetensors"))
        tokenizer = contents_sha256(self._folders.tokenizer, ("*.json", "*.model", "*.txt"))
        return f"umt5-{encoder[:16]}-{tokenizer[:8]}-{self.tokens}-{str(self.dtype).removeprefix('torch.')}"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B] texts -> float32 [B, text_tokens, text_dim] on the CPU; longer prompts are cut."""
        out = torch.zeros(len(prompts), self.tokens, self.dim)
        encoder, tokenizer = self._ready()
        for row, prompt in zip(out, prompts, strict=True):
            found = tokenizer(
                [clean_prompt(prompt)],
                padding="max_length",
                max_length=self.tokens,
                truncation=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            mask = found["attention_mask"]
            hidden = encoder(found["input_ids"].to(self._device), mask.to(self._device)).last_hidden_state[0]
            length = int(mask.sum())
            row[:length] = hidden[:length].float().cpu()
        return out

    def release(self) -> None:
        """Drop the encoder from memory."""
        if self._loaded is not None:
            self._loaded = None
            free_memory()

    @cached_property
    def _folders(self) -> _Folders:
        folders = _Folders(*(local_path(f"{self._source}/{part}", _KEY) for part in ("text_encoder", "tokenizer")))
        width = _width(folders.encoder)
        if width != self.dim:
            raise UserError(
                f"student.text_dim: {self.dim}, but the encoder in {folders.encoder} gives {width}. "
                f"Set student.text_dim={width} for a new student, or name the encoder that yours was trained with."
            )
        return folders

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            folders = self._folders
            tokenizer = _load_tokenizer(folders.tokenizer)
            encoder = _load_encoder(folders.encoder, self.dtype)
            self._loaded = _Loaded(encoder.to(self._device), tokenizer)  # pyright: ignore[reportArgumentType]
        return self._loaded


def clean_prompt(text: str) -> str:
    """Broken Unicode mended, HTML entities resolved (twice: they come escaped twice), white space single."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def _width(folder: Path) -> int:
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kind, width = about["model_type"], about["d_model"]
    except FileNotFoundError:
        raise UserError(
            f"{_KEY}: {folder} holds no config.json. Name a diffusers folder with text_encoder/ and tokenizer/."
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{_KEY}: {path} is not a configuration of transformers ({error!r})") from None
    if kind != "umt5":
        raise UserError(f"{_KEY}: {folder} holds a {kind}, not a umt5. Name a diffusers folder of Wan 2.1.")
    return width


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():  # else transformers takes the path for a name on the Hub
        raise UserError(f"{_KEY}: {folder} is missing. Name a diffusers folder with text_encoder/ and tokenizer/.")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{_KEY}: {folder} is not a tokenizer ({error}). Copy or download it again.") from None


def _load_encoder(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{_KEY}: {folder} cannot be loaded ({error}). Copy or download it again.") from None
    encoder, report = loaded
    missing = set(report["missing_keys"])
    if odd := sorted(missing - set(_TIED)) or (sorted(_TIED) if missing.issuperset(_TIED) else []):
        raise UserError(f"{_KEY}: {folder} lacks {len(odd)} tensors, for example {odd[0]}. Download it again.")
    _tie(encoder, missing)
    return encoder.eval().requires_grad_(False)


def _tie(encoder: Any, missing: set[str]) -> None:
    # A file holds the embedding once, under one of two names. Some versions of transformers 5 leave the other all zero
    # when the configuration says `tie_word_embeddings: false`, as Wan's does (transformers issue 43992).
    if "shared.weight" in missing:
        encoder.shared.weight = encoder.encoder.embed_tokens.weight
    else:
        encoder.encoder.embed_tokens.weight = encoder.shared.weight
