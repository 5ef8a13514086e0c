"""What costs much to compute and never changes, kept on disk beside the shards: prompts' embeddings, teacher's latents.

    CACHE/text/<text encoder>/<sha256 of the text>.safetensors
    CACHE/latents/<autoencoder>-<W>x<H>-<frames>f-<fps>fps/<sha256 of the mp4>.safetensors

Filled before training, so that neither text encoder nor autoencoder stays in memory while it lasts.  Any number of
processes may fill one folder at once and be killed at any time: a file under its final name is complete, and only its
first writer's work counts.  A damaged file is noticed by its checksum when it is read, and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from afd_data.config import VideoConfig
from afd_data.examples import Example
from afd_data.files import atomic_write
from afd_data.progress import progress_bar
from afd_data.stream import Stream
from afd_train.students.autoencoders import Autoencoder
from afd_train.students.text import HashedWords, TextEncoder

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MEMORY_BYTES = 256 * 2**20  # of embeddings; 400 prompts of 80 tokens for UMT5
STRAY_SECONDS = 3600.0  # after which a file that was never renamed belongs to a process that was killed


class CachedText:
    """A text encoder that encodes a prompt once; itself a `TextEncoder`.

    Embeddings lie in memory (the longest unused go first) and in `folder`, without their padding and in the encoder's
    dtype; the encoder is loaded when a prompt is in neither.  Without a folder, and for `HashedWords`, which are
    quicker to compute than to read, nothing is written.
    """

    def __init__(self, encoder: TextEncoder, folder: Path | None):
        self.tokens, self.dim, self.dtype = encoder.tokens, encoder.dim, encoder.dtype
        self._encoder = encoder
        self._parent = None if isinstance(encoder, HashedWords) or folder is None else folder / "text"
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def identity(self) -> str:
        """The encoder's."""
        return self._encoder.identity

    def fill(self, prompts: Iterable[str], rank: int = 0, ranks: int = 1) -> None:
        """Put every prompt on disk, then release the encoder; `ranks` processes share the work.

        On return all are there, whoever made them.  Where nothing is written, `prompts` is not even looked at.
        """
        folder = self._folder
        if folder is None:
            return
        missing = [prompt for prompt in dict.fromkeys(prompts) if not _path(folder, prompt).exists()]
        if missing:
            _remove_strays(folder)
            with progress_bar(len(missing), "prompt", "text", disable=rank > 0) as bar:
                for prompt in own_first(missing, rank, ranks):
                    if not _path(folder, prompt).exists():
                        self._make(prompt)
                    bar.update()
        self.release()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B] texts -> float32 [B, tokens, dim] on the CPU, as the encoder itself gives them."""
        found = {prompt: self._find(prompt) for prompt in dict.fromkeys(prompts)}
        for prompt in [prompt for prompt, rows in found.items() if rows is None]:
            found[prompt] = self._make(prompt)
        out = torch.zeros(len(prompts), self.tokens, self.dim)
        for row, prompt in zip(out, prompts, strict=True):
            rows = found[prompt]
            assert rows is not None
            row[: len(rows)] = rows
        return out

    def release(self) -> None:
        """Drop the encoder's weights from memory; embeddings stay."""
        self._encoder.release()

    @cached_property
    def _folder(self) -> Path | None:
        return None if self._parent is None else self._parent / self.identity

    def _find(self, prompt: str) -> Tensor | None:
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        folder = self._folder
        rows = None if folder is None else read_tensor(_path(folder, prompt))
        return rows if rows is None else self._remember(prompt, rows)

    def _make(self, prompt: str) -> Tensor:
        rows = self._encoder.encode([prompt])[0]
        used = int(rows.any(1).nonzero().max()) + 1 if rows.any() else 0
        rows = rows[:used].to(self.dtype)
        if (folder := self._folder) is not None:
            write_tensor(_path(folder, prompt), rows)
        return self._remember(prompt, rows)

    def _remember(self, prompt: str, rows: Tensor) -> Tensor:
        old = self._memory.pop(prompt, None)
        self._memory[prompt] = rows
        self._bytes += rows.nbytes - (0 if old is None else old.nbytes)
        while self._bytes > MEMORY_BYTES:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes
        return rows


class LatentCache:
    """The teacher's clips as latents, so that training neither decodes videos nor needs the autoencoder.

    Kept in float32: what training sees is bit for bit what encoding on the fly would give.  bfloat16 would halve the
    files (8.4 MB for 81 frames of 832 x 480), but round the teacher's latents and not the student's, and it is the
    difference between these two that a discriminator is trained to find.
    """

    def __init__(self, folder: Path, autoencoder: Autoencoder, video: VideoConfig, device: torch.device | str = "cpu"):
        """`device`: where clips are encoded."""
        self._autoencoder, self._device = autoencoder, torch.device(device)
        shape = f"{video.width}x{video.height}-{video.frames}f-{video.fps:g}fps"
        self.folder = folder / "latents" / f"{autoencoder.identity}-{shape}"
        self._clip_shape = (video.frames, video.height, video.width, 3)
        self._sources: dict[str, Stream] = {}

    def fill(self, stream: Stream) -> None:
        """Encode every clip of the stream's split that is missing, then release the autoencoder.

        The stream's ranks share the work; on return all are there, whoever made them.  Raises UserError naming shard
        and key of a clip that cannot be used.
        """
        self._sources[stream.split] = stream
        missing = [key for key in stream.keys if not self._path(stream.places[key].mp4_sha256).exists()]
        if not missing:
            return
        _remove_strays(self.folder)
        with progress_bar(len(missing), "clip", f"{stream.split} latents", disable=stream.rank > 0) as bar:
            for key in own_first(missing, stream.rank, stream.ranks):
                if not self._path(stream.places[key].mp4_sha256).exists():
                    self._make(stream.decoded(key))
                bar.update()
        self._autoencoder.release()

    def latents(self, examples: Sequence[Example]) -> Tensor:
        """Latents of examples from streams that `fill` was given: float32 [B, f, C, h, w] on the CPU."""
        found = [read_tensor(self._path(example.mp4_sha256)) for example in examples]
        if any(latents is None for latents in found):
            found = [
                self._make(self._sources[example.split].decoded(example.key)) if latents is None else latents
                for latents, example in zip(found, examples, strict=True)
            ]
            self._autoencoder.release()
        return torch.stack([latents for latents in found if latents is not None])

    def _make(self, example: Example) -> Tensor:
        if example.video.shape != self._clip_shape:
            raise ValueError(f"{example.key}: {list(example.video.shape)}, this cache is of {list(self._clip_shape)}")
        video = torch.from_numpy(example.video.copy())[None].to(self._device)
        latents = self._autoencoder.encode(video)[0].float().cpu()
        write_tensor(self._path(example.mp4_sha256), latents)
        return latents

    def _path(self, mp4_sha256: str) -> Path:
        return self.folder / f"{mp4_sha256}{SUFFIX}"


def own_first(items: Sequence[str], rank: int, ranks: int) -> list[str]:
    """`items` in the order in which one of several processes goes through them, skipping what is done by then.

    First its own share, every `ranks`-th; then the shares of the others from their ends, so that it helps the slower
    ones, and all of it is done when it is through.
    """
    others = [items[(rank + shift) % ranks :: ranks][::-1] for shift in range(1, ranks)]
    return [*items[rank::ranks], *(item for share in others for item in share)]


def write_tensor(path: Path, tensor: Tensor) -> None:
    """Put a tensor with its checksum into a safetensors file of its own; the folder is made.  Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensor = tensor.contiguous()
    # Written under a name that no other process uses: two of them may make the same file at the same time.
    own = path.with_name(f"{path.stem}.{secrets.token_hex(8)}")
    with atomic_write(own) as file:
        file.write(serialise({"tensor": tensor}, metadata={"sha256": _checksum(tensor)}))
    os.replace(own, path)


def read_tensor(path: Path) -> Tensor | None:
    """What `write_tensor` put there, on the CPU; None when there is no such file or it is damaged, which is logged."""
    try:
        data = path.read_bytes()
        tensor = deserialise(data)["tensor"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header["__metadata__"]["sha256"] == _checksum(tensor):
            return tensor
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass
    log.warning(f"{path}: damaged; made again")
    return None


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path(folder: Path, prompt: str) -> Path:
    return folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}{SUFFIX}"


def _remove_strays(folder: Path) -> None:
    """Files of processes that were killed between opening and renaming them."""
    for path in folder.iterdir() if folder.exists() else ():
        with suppress(FileNotFoundError):  # another process renames or removes it
            if path.suffix != SUFFIX and time.time() - path.stat().st_mtime > STRAY_SECONDS:
                path.unlink()
