"""Embeddings and latents on disk: the same numbers as without, made once, by whoever comes first, and mended."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor

from afd_data.config import CacheConfig, PlaygroundConfig, PromptsConfig, StreamConfig, VideoConfig
from afd_data.errors import UserError
from afd_data.stream import Stream
from afd_train import conditioning
from afd_train.conditioning import CachedText, LatentCache, own_first, read_tensor, write_tensor
from afd_train.config import Recipe, StudentConfig
from afd_train.students.autoencoders import PixelAutoencoder
from afd_train.students.text import HashedWords
from afd_train.students.umt5 import Umt5
from afd_train.students.wan_autoencoder import WanAutoencoder
from tests.conftest import VIDEO
from tests.tiny_wan import TEXT_DIM, save_text_encoder, save_vae

PROMPTS = ["a red ball falls", "", "the green ball bounces"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("umt5"))


def umt5(weights: Path, dtype: torch.dtype = torch.bfloat16) -> Umt5:
    config = StudentConfig(text_encoder="umt5", text_encoder_path=str(weights), text_tokens=32, text_dim=TEXT_DIM)
    return Umt5(config, dtype, "cpu")


def file_of(folder: Path, encoder: Umt5, prompt: str) -> Path:
    return folder / "text" / encoder.identity / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" ').replace(b'"F32"', b'"I32"'))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit of a number": flip_last_byte,
    "another dtype": flip_dtype,
    "no checksum": lambda path: path.write_bytes(path.read_bytes().replace(b"sha256", b"sha257")),
    "something else": lambda path: path.write_bytes(b"<html>" * 100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_encoders_own_before_and_after_they_were_kept(weights, tmp_path, dtype):
    expected = umt5(weights, dtype).encode(PROMPTS)
    for _ in range(2):
        assert torch.equal(CachedText(umt5(weights, dtype), tmp_path).encode(PROMPTS), expected)


def test_a_file_holds_the_tokens_without_padding_in_the_encoders_dtype(weights, tmp_path):
    CachedText(umt5(weights), tmp_path).encode(PROMPTS)
    kept = load_file(file_of(tmp_path, umt5(weights), "a red ball falls"))["tensor"]
    assert kept.shape == (5, TEXT_DIM)  # four words and the end
    assert kept.dtype == torch.bfloat16


def test_a_kept_prompt_needs_no_encoder(weights, tmp_path):
    CachedText(umt5(weights), tmp_path).fill(PROMPTS)
    encoder = umt5(weights)
    CachedText(encoder, tmp_path).encode([*PROMPTS, *PROMPTS])
    assert encoder._loaded is None


def test_filling_leaves_the_encoder_released(weights, tmp_path):
    encoder = umt5(weights)
    CachedText(encoder, tmp_path).fill(PROMPTS)
    assert encoder._loaded is None
    assert all(file_of(tmp_path, encoder, prompt).exists() for prompt in PROMPTS)


def test_another_encoder_keeps_elsewhere(weights, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        CachedText(umt5(weights, dtype), tmp_path).fill(PROMPTS)
    assert [len(list(folder.iterdir())) for folder in (tmp_path / "text").iterdir()] == [3, 3]


def test_hashed_words_write_nothing(tmp_path):
    words = HashedWords(StudentConfig())
    cached = CachedText(words, tmp_path)
    cached.fill(PROMPTS)
    assert torch.equal(cached.encode(PROMPTS), words.encode(PROMPTS))
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_a_prompt_is_encoded_once_and_nothing_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = umt5(weights)
    cached = CachedText(encoder, None)
    before = cached.encode(PROMPTS)
    cached.release()
    assert torch.equal(cached.encode(PROMPTS), before)
    assert encoder._loaded is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_embedding_is_noticed_and_made_again(weights, tmp_path, damage, caplog):
    expected = umt5(weights).encode(PROMPTS)
    CachedText(umt5(weights), tmp_path).fill(PROMPTS)
    path = file_of(tmp_path, umt5(weights), PROMPTS[0])
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(CachedText(umt5(weights), tmp_path).encode(PROMPTS), expected)
    assert path.read_bytes() == whole
    assert f"{path}: damaged" in caplog.text


def test_memory_holds_no_more_than_it_may_and_the_longest_unused_go_first(monkeypatch):
    monkeypatch.setattr(conditioning, "MEMORY_BYTES", 3 * 64 * 4)  # three words of 64 numbers
    cached = CachedText(HashedWords(StudentConfig()), None)
    for word in ("one", "two", "three", "one", "four"):
        cached.encode([word])
    assert list(cached._memory) == ["three", "one", "four"]
    assert cached._bytes == 3 * 64 * 4


def test_a_process_does_its_own_share_first_and_then_all_others_from_their_ends():
    items = list("abcdefgh")
    assert own_first(items, 0, 1) == items
    assert own_first(items, 1, 3) == ["b", "e", "h", "f", "c", "g", "d", "a"]


def test_files_that_were_never_finished_are_removed_when_they_are_old(weights, tmp_path):
    cached = CachedText(umt5(weights), tmp_path)
    folder = tmp_path / "text" / cached.identity
    folder.mkdir(parents=True)
    old, young = folder / "00.aa.part", folder / "00.bb.part"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    cached.fill(PROMPTS)
    assert (old.exists(), young.exists()) == (False, True)


def write_for_ever(folder: Path) -> None:
    while True:
        for number in range(5):
            write_tensor(folder / f"{number}.safetensors", torch.full((1000,), float(number)))


def test_processes_that_write_the_same_files_and_are_killed_leave_only_complete_ones(tmp_path, caplog):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_for_ever, args=(tmp_path,), daemon=True) for _ in range(3)]
    for writer in writers:
        writer.start()
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.01)
    rounds = [[read_tensor(path) for path in paths] for _ in range(30)]
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)  # type: ignore[arg-type]
        writer.join()
    for found in [*rounds, [read_tensor(path) for path in paths]]:
        assert [tensor.unique().tolist() for tensor in found if tensor is not None] == [[0], [1], [2], [3], [4]]
    assert "damaged" not in caplog.text


def test_tensors_of_any_dtype_and_no_rows_come_back(tmp_path):
    for tensor in (torch.zeros(0, 4), torch.arange(6.0).reshape(2, 3).T, torch.tensor(2.5, dtype=torch.bfloat16)):
        write_tensor(tmp_path / "x.safetensors", tensor)
        found = read_tensor(tmp_path / "x.safetensors")
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@pytest.fixture
def clips(playground_cache: Path, tmp_path: Path) -> Path:
    """A copy of the playground's cache, to be filled with latents."""
    return Path(shutil.copytree(playground_cache, tmp_path / "cache"))


def stream(folder: Path, split: str = "train", video: VideoConfig = VIDEO, **options) -> Stream:
    return Stream(folder, StreamConfig(), split, 0, video=video, **options)


def encoded(autoencoder: PixelAutoencoder | WanAutoencoder, source: Stream, keys: list[str]) -> Tensor:
    return torch.cat([autoencoder.encode(torch.from_numpy(source.decoded(key).video.copy())[None]) for key in keys])


def test_cached_latents_are_bit_for_bit_those_of_the_decoded_clips(clips):
    pixels = PixelAutoencoder(StudentConfig())
    cache = LatentCache(clips, pixels, VIDEO)
    source = stream(clips, decode=False)
    cache.fill(source)
    examples = source.next_batch(5)
    found = cache.latents(examples)
    assert found.dtype == torch.float32
    assert torch.equal(found, encoded(pixels, source, [example.key for example in examples]))


def test_splits_share_a_folder_of_one_file_a_clip(clips):
    cache = LatentCache(clips, PixelAutoencoder(StudentConfig()), VIDEO)
    for split in ("train", "validation"):
        cache.fill(stream(clips, split))
    assert cache.folder.parent == clips / "latents"
    assert cache.folder.name.endswith("-16x16-4f-8fps")
    assert len(list(cache.folder.iterdir())) == 16


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), flip_last_byte, *list(DAMAGE.values())[:2]])
def test_damaged_and_lost_latents_are_made_again(clips, damage):
    pixels = PixelAutoencoder(StudentConfig())
    cache, source = LatentCache(clips, pixels, VIDEO), stream(clips, decode=False)
    cache.fill(source)
    examples = source.next_batch(3)
    path = cache.folder / f"{examples[1].mp4_sha256}.safetensors"
    whole = path.read_bytes()
    damage(path)
    assert torch.equal(cache.latents(examples), encoded(pixels, source, [example.key for example in examples]))
    assert path.read_bytes() == whole


def test_what_one_process_has_made_another_does_not_make_again(clips):
    first = LatentCache(clips, PixelAutoencoder(StudentConfig()), VIDEO)
    first.fill(stream(clips, ranks=2))
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert len(before) == 12  # all of them, though two processes were to share the work
    second = LatentCache(clips, PixelAutoencoder(StudentConfig()), VIDEO)
    second.fill(stream(clips, rank=1, ranks=2))
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


def test_another_size_or_autoencoder_keeps_elsewhere(clips):
    videos = [VIDEO.model_copy(update=change) for change in ({}, {"width": 32}, {"frames": 8}, {"fps": 16.0})]
    folders = {LatentCache(clips, PixelAutoencoder(StudentConfig()), video).folder for video in videos}
    folders.add(LatentCache(clips, PixelAutoencoder(StudentConfig(pixel_scale=1.0)), VIDEO).folder)
    assert len(folders) == 5


def test_a_clip_of_another_size_is_named(clips):
    cache = LatentCache(clips, PixelAutoencoder(StudentConfig()), VIDEO)
    with pytest.raises(UserError, match=r"the recipe wants 8 of 16x16"):
        cache.fill(stream(clips, video=VIDEO.model_copy(update={"frames": 8})))


def test_the_commands_on_caches_do_not_mind_what_lies_beside_the_shards(clips, weights, afd: Callable[..., Result]):
    LatentCache(clips, PixelAutoencoder(StudentConfig()), VIDEO).fill(stream(clips))
    CachedText(umt5(weights), clips).fill(PROMPTS)
    for command in ("verify", "inspect", "status"):
        result = afd("cache", command, clips)
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def wan_clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VideoConfig]:
    """A playground cache of three clips of 5 frames, which Wan's autoencoder can take."""
    from afd_data.cache import cache_teacher
    from afd_data.prompts import load_prompts
    from afd_data.teachers import open_teacher

    folder = tmp_path_factory.mktemp("wan_clips")
    (folder / "prompts.txt").write_text("A red ball is dropped.\nA green ball is dropped.\nA blue ball is dropped.\n")
    recipe = Recipe(
        out=str(folder),
        student=StudentConfig(autoencoder="wan"),
        video=VideoConfig(width=16, height=16, frames=5, fps=8.0, lossless=True),
        prompts=PromptsConfig(source=str(folder / "prompts.txt"), near_duplicate=1.0),
        teacher=PlaygroundConfig(),
        cache=CacheConfig(frozen=0.0, near_duplicate=-1),
    )
    teacher = open_teacher(recipe.teacher)
    prompts = load_prompts(recipe.prompts, folder, teacher)
    cache_teacher(recipe, prompts, folder / "cache", teacher, progress=False)
    return folder / "cache", recipe.video


def test_wans_latents_are_cached_once_and_the_vae_leaves_the_memory(wan_clips, tmp_path):
    folder, video = wan_clips
    vae = save_vae(tmp_path / "vae")
    config = StudentConfig(autoencoder="wan", autoencoder_path=str(vae))
    filling = WanAutoencoder(config)
    LatentCache(folder, filling, video).fill(stream(folder, video=video))
    assert filling._vae is None

    idle, source = WanAutoencoder(config), stream(folder, video=video, decode=False)
    cache = LatentCache(folder, idle, video)
    cache.fill(source)
    examples = source.next_batch(3)
    found = cache.latents(examples)
    assert idle._vae is None
    assert found.shape == (3, 2, 16, 2, 2)
    assert torch.equal(found, encoded(filling, source, [example.key for example in examples]))
