"""Wan's VAE: diffusers' numbers, decoded in pieces, and clear words for a folder that is something else."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from afd_data.errors import UserError
from afd_train.student_config import StudentConfig
from afd_train.students.autoencoders import open_autoencoder
from afd_train.students.wan_autoencoder import WanAutoencoder
from tests.tiny_wan import save_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("wan") / "vae")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, for a test to damage."""
    return Path(shutil.copytree(folder, tmp_path / "vae"))


def wan(folder: Path, **options) -> WanAutoencoder:
    return WanAutoencoder(StudentConfig(autoencoder="wan", autoencoder_path=str(folder)), **options)


def video(frames: int = 9, clips: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (clips, frames, 16, 24, 3), dtype=torch.uint8, generator=generator)


def latents(frames: int = 5, clips: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(clips, frames, 16, 2, 3, generator=torch.Generator().manual_seed(seed))


def in_pieces(stream: Callable[[Tensor], Tensor], whole: Tensor, sizes: list[int]) -> list[Tensor]:
    return [stream(piece) for piece in whole.split(sizes, 1)]


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    return mean.view(1, 16, 1, 1, 1), deviation.view(1, 16, 1, 1, 1)


@torch.no_grad()
def test_latents_are_the_normalised_mode_of_the_posterior(folder):
    vae = AutoencoderKLWan.from_pretrained(folder)
    mean, deviation = statistics(vae)
    mode = vae.encode(video().permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()  # type: ignore[union-attr]
    found = wan(folder).encode(video())
    assert found.shape == (1, 3, 16, 2, 3)
    assert_close(found, ((mode - mean) / deviation).transpose(1, 2))


@torch.no_grad()
def test_frames_are_those_of_diffusers(folder):
    vae = AutoencoderKLWan.from_pretrained(folder)
    mean, deviation = statistics(vae)
    pixels = vae.decode(latents().transpose(1, 2) * deviation + mean).sample  # type: ignore[union-attr]
    found = wan(folder).decode(latents())
    assert found.shape == (1, 17, 16, 24, 3)  # the first latent frame is one pixel frame, the other four are four each
    assert_close(found.float(), ((pixels + 1) * 127.5).permute(0, 2, 3, 4, 1), atol=0.501, rtol=0)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [3, 2], [1, 4], [5]])
def test_frames_decoded_in_pieces_are_those_of_the_whole(folder, sizes):
    found = wan(folder)
    pieces = in_pieces(found.stream(), latents(clips=2), sizes)
    assert [piece.shape[1] for piece in pieces] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
    assert torch.equal(torch.cat(pieces, 1), found.decode(latents(clips=2)))


def test_two_streams_that_take_turns_do_not_disturb_each_other(folder):
    found = wan(folder)
    one, other = found.stream(), found.stream()
    turns = [(one(a), other(b)) for a, b in zip(latents(seed=1).split(1, 1), latents(seed=2).split(1, 1), strict=True)]
    assert torch.equal(torch.cat([turn[0] for turn in turns], 1), found.decode(latents(seed=1)))
    assert torch.equal(torch.cat([turn[1] for turn in turns], 1), found.decode(latents(seed=2)))


def test_later_latents_change_no_earlier_frame(folder):
    found, changed = wan(folder), latents()
    changed[:, 3:] += 1
    before, after = found.decode(latents()), found.decode(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_a_clip_does_not_depend_on_its_batch(folder):
    found = wan(folder)
    assert torch.equal(found.decode(latents(clips=3))[1:2], found.decode(latents(clips=3)[1:2]))
    assert torch.equal(found.encode(video(clips=3))[1:2], found.encode(video(clips=3)[1:2]))


def test_a_stream_keeps_to_its_number_of_videos(folder):
    stream = wan(folder).stream()
    stream(latents(1, clips=2))
    with pytest.raises(ValueError, match="a stream of 2 videos was given a chunk of 1"):
        stream(latents(1, clips=1))


@pytest.mark.parametrize("frames", [8, 10])
def test_frames_that_the_vae_would_drop_are_refused(folder, frames):
    with pytest.raises(ValueError, match=rf"{frames} frames of 24x16; want 1 \+ 4 n"):
        wan(folder).encode(video(frames))


def test_a_round_trip_loads_nothing(tmp_path):
    given = latents()
    assert wan(tmp_path / "nowhere").round_trip(given) is given


def test_released_weights_leave_the_memory_and_an_open_stream_goes_on(folder):
    found = wan(folder)
    whole, stream = found.decode(latents()), found.stream()
    first = stream(latents()[:, :2])
    vae = weakref.ref(found._vae)  # type: ignore[arg-type]
    found.release()
    gc.collect()
    assert vae() is None
    assert torch.equal(torch.cat([first, stream(latents()[:, 2:])], 1), whole)


def test_no_gradient_is_kept(folder):
    found = wan(folder)
    assert not found.encode(video()).requires_grad
    assert not found.decode(latents().requires_grad_()).requires_grad


def test_bfloat16_stays_near_float32_and_gives_float32_latents(folder):
    exact, rounded = wan(folder).encode(video()), wan(folder, dtype=torch.bfloat16).encode(video())
    assert rounded.dtype == torch.float32
    error = (exact - rounded).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


def test_the_identity_follows_from_contents_and_dtype(folder, copy, tmp_path):
    identity = wan(folder).identity
    assert wan(copy).identity == identity
    (copy / "README.md").write_text("not a weight")
    assert wan(copy).identity == identity
    assert wan(folder, dtype=torch.bfloat16).identity != identity
    assert wan(save_vae(tmp_path / "other", seed=1)).identity != identity


def test_blobs_of_a_hub_cache_are_not_read_to_know_their_hash(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    name = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (blobs / name).write_bytes(b"never read")
    (blobs / ("0" * 40)).write_bytes((folder / "config.json").read_bytes())  # a small file, named by its git hash
    (snapshot / WEIGHTS).symlink_to(f"../../blobs/{name}")
    (snapshot / "config.json").symlink_to(f"../../blobs/{'0' * 40}")
    assert wan(snapshot).identity == wan(folder).identity


def test_a_file_that_changes_is_read_again(copy):
    before = wan(copy).identity
    save_vae(copy, seed=1)
    assert wan(copy).identity != before


def test_the_recipe_says_which_autoencoder_it_is(folder):
    config = StudentConfig(autoencoder="wan", autoencoder_path=str(folder))
    assert type(open_autoencoder(config)).__name__ == "WanAutoencoder"
    assert type(open_autoencoder(StudentConfig())).__name__ == "PixelAutoencoder"


def test_a_folder_without_a_vae_is_named(tmp_path):
    with pytest.raises(UserError, match=r"student\.autoencoder_path: .* holds no config\.json"):
        wan(tmp_path).encode(video())


def test_a_folder_of_something_else_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    with pytest.raises(UserError, match="holds a WanTransformer3DModel, not an AutoencoderKLWan"):
        wan(tmp_path).identity  # noqa: B018


def test_a_configuration_that_is_no_json_is_named(copy):
    (copy / "config.json").write_text("<html>")
    with pytest.raises(UserError, match=r"config\.json is not a configuration of diffusers"):
        wan(copy).decode(latents())


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
            "4 channels with strides of 4 frames and 8",
        ),
        ({"dim_mult": [1, 2, 2], "temperal_downsample": [True, True]}, "16 channels with strides of 4 frames and 4"),
        ({"temperal_downsample": [False, False, True]}, "16 channels with strides of 2 frames and 8"),
    ],
)
def test_a_vae_of_another_shape_is_refused(tmp_path, settings, found):
    with pytest.raises(UserError, match=f"makes latents of {found} pixels; a student needs 16, 4 and 8"):
        wan(save_vae(tmp_path / "vae", **settings)).encode(video())


def test_a_missing_tensor_is_named(copy):
    state = load_file(copy / WEIGHTS)
    del state["decoder.conv_in.weight"]
    save_file(state, copy / WEIGHTS)
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight"):
        wan(copy).encode(video())


def test_truncated_weights_are_named(copy):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        wan(copy).encode(video())


def test_pickled_weights_are_not_opened(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        wan(copy).encode(video())
