"""Teacher `local`: a tiny random WanPipeline through `afd cache-teacher`, in batches, from a folder and from a Hub."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from afd_data.config import VideoConfig
from afd_data.errors import UserError
from afd_data.index import read_index
from afd_data.teacher_config import LocalConfig
from afd_data.teachers import FailedError, Request
from afd_data.teachers.gathering import Gatherer
from afd_data.teachers.local import Local
from afd_data.teachers.pipelines import Model, as_uint8
from afd_data.video import read_video
from tests.hub_server import HubServer
from tests.tiny_wan import TEXT_DIM, save_text_encoder, save_vae

VIDEO = VideoConfig(width=32, height=32, frames=5, fps=8.0, lossless=True)
RECIPE = """
out: {out}
video: {{width: 32, height: 32, frames: 6, fps: 8, lossless: true}}
prompts: {{source: prompts.txt}}
teacher: {{name: local, model: {model}, steps: 2, guidance: 1.0, batch: 2, device: cpu}}
cache: {{workers: 4, frozen: 0, near_duplicate: -1}}
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a WanPipeline with random weights; not to be written to."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    parts = save_text_encoder(tmp_path_factory.mktemp("parts"))
    save_vae(parts / "vae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=TEXT_DIM, freq_dim=16, ffn_dim=32, num_layers=1,
            rope_max_seq_len=32,
        )  # fmt: skip
    pipeline = WanPipeline(
        AutoTokenizer.from_pretrained(parts / "tokenizer"),
        UMT5EncoderModel.from_pretrained(parts / "text_encoder"),
        AutoencoderKLWan.from_pretrained(parts / "vae"),
        FlowMatchEulerDiscreteScheduler(),
        transformer,
    )
    folder = tmp_path_factory.mktemp("pipeline") / "tiny-wan"
    pipeline.save_pretrained(folder)
    return folder


def asked(seed: int = 1, prompt: str = "a red ball falls") -> Request:
    return Request(f"{seed:064x}", "p0", prompt, 0, seed, VIDEO)


def teacher(model: Path | str, **settings: Any) -> Local:
    chosen: dict[str, Any] = {"steps": 2, "guidance": 1.0, "device": "cpu"}
    return Local(LocalConfig(model=str(model), **(chosen | settings)))


def drawn(local: Local, request: Request, target: Path) -> np.ndarray:
    local.fetch(local.submit(request), request, target)
    return read_video(target).frames


def test_a_cache_of_a_pipelines_videos(model: Path, afd: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red ball falls\nthe green ball bounces\na ball bounces\n")
    (tmp_path / "local.yaml").write_text(RECIPE.format(out=tmp_path / "out", model=model))
    result = afd("cache-teacher", tmp_path / "local.yaml")
    assert result.exit_code == 0, (result.output, result.exception)
    rows = read_index(tmp_path / "out" / "cache", "train").to_pylist()
    assert len(rows) == 3
    assert len({row["mp4_sha256"] for row in rows}) == 3
    assert "Loading" not in result.output


def test_other_weights_of_the_same_size_are_another_model_and_a_readme_is_none(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-wan"
    shutil.copytree(model, folder)
    before = Model(str(folder)).facts
    (folder / "README.md").write_text("About this model.")
    assert Model(str(folder)).facts == before == Model(str(model)).facts
    weights = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Model(str(folder)).facts != before


def test_a_model_index_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"^teacher\.model: .*model_index\.json .*no JSON object"):
        teacher(tmp_path)


def test_noise_does_not_depend_on_the_batch(model: Path, tmp_path: Path) -> None:
    requests = [asked(1), asked(2, "the green ball bounces"), asked(3)]
    alone = teacher(model)
    single = [drawn(alone, request, tmp_path / f"{request.seed}") for request in requests]
    together = teacher(model, batch=3)
    with ThreadPoolExecutor(3) as pool:
        batch = list(pool.map(lambda request: drawn(together, request, tmp_path / f"b{request.seed}"), requests))
    for one, other in zip(single, batch, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1  # rounding
    assert np.abs(single[0].astype(int) - single[2]).max() > 1  # another seed is another video


def test_the_same_request_draws_the_same_video_again(model: Path, tmp_path: Path) -> None:
    first, second = (drawn(teacher(model), asked(), tmp_path / name) for name in "ab")
    assert np.array_equal(first, second)


def test_options_choose_the_size_drawn_and_the_rules_fit_it(model: Path, tmp_path: Path) -> None:
    local = teacher(model, options={"height": 48, "width": 64, "num_frames": 9}, start="middle")
    delivery = local.fetch("x", asked(), tmp_path / "a")
    assert delivery.effective["source"] == {"frames": 9, "height": 48, "width": 64}
    assert delivery.effective["start_s"] == 0.25  # 4 of 9 frames are left out, 2 of them in front
    assert read_video(tmp_path / "a").frames.shape == (5, 32, 32, 3)


def test_the_identity_is_of_the_weights_and_settings_not_of_the_place(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "tiny-wan")
    before = teacher(model).identity.settings
    assert teacher(tmp_path / "tiny-wan", batch=7).identity.settings == before
    assert (before["pipeline"], before["dtype"], before["steps"]) == ("WanPipeline", "float32", 2)
    config = tmp_path / "tiny-wan" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 7.0}))
    assert teacher(tmp_path / "tiny-wan").identity.settings != before


def test_a_model_of_the_hub_is_pinned_to_its_commit(model: Path, hub: HubServer, tmp_path: Path) -> None:
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    commit = hub.add("alice/tiny-wan", files)
    hub.repos["models", "alice/tiny-wan"].tags["v1"] = commit
    local = teacher("alice/tiny-wan@v1")
    assert local.identity.settings["revision"] == commit
    assert np.array_equal(drawn(local, asked(), tmp_path / "a"), drawn(teacher(model), asked(), tmp_path / "b"))
    with pytest.raises(UserError, match=r"teacher\.model: alice/gone.*no such repository"):
        teacher("alice/gone")
    with pytest.raises(UserError, match="no branch, tag or commit 'v2'"):
        teacher("alice/tiny-wan@v2")


def test_what_is_neither_a_folder_nor_a_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'models/wan/x' is neither a folder here nor OWNER/NAME"):
        teacher("models/wan/x")
    with pytest.raises(UserError, match=r"is no pipeline of diffusers: it has no model_index\.json"):
        teacher(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionPipeline", "makes no videos from text alone: it does not take a prompt and num_frames"),
        ("WanImageToVideoPipeline", "makes no videos from text alone: it wants image"),
        (["pipeline", "Mine"], r"no pipeline \['pipeline', 'Mine'\], and code that comes with a model is not run"),
        ("NoSuchPipeline", "has no pipeline 'NoSuchPipeline'"),
    ],
    ids=str,
)
def test_a_pipeline_that_cannot_be_a_teacher_is_refused_before_it_is_loaded(
    tmp_path: Path, name: object, message: str
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match=message):
        teacher(tmp_path)


def test_settings_that_the_pipeline_does_not_take_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.options: WanPipeline takes no video_length"):
        teacher(model, options={"video_length": 3})
    with pytest.raises(UserError, match=r"teacher\.options: WanPipeline takes no generator"):
        teacher(model, options={"generator": 3})
    with pytest.raises(UserError, match=r"did not draw a video: `height` and `width` have to be divisible by 16.*Set"):
        drawn(teacher(model, options={"height": 24}), asked(), tmp_path / "a")


def test_weights_that_are_no_safetensors_are_not_loaded(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    weights = next((tmp_path / "m" / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(UserError, match="cannot be loaded"):
        drawn(teacher(tmp_path / "m"), asked(), tmp_path / "a")


def test_frames_of_every_kind_become_bytes() -> None:
    import torch
    from PIL import Image

    want = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    assert np.array_equal(as_uint8(want), want)
    assert np.array_equal(as_uint8((want / 255).astype(np.float32)), want)
    assert np.array_equal(as_uint8([Image.fromarray(frame) for frame in want]), want)
    assert np.array_equal(as_uint8(torch.from_numpy(want / 255).permute(0, 3, 1, 2)), want)
    with pytest.raises(FailedError, match="not finite"):
        as_uint8(np.full((2, 4, 6, 3), np.nan))


def test_requests_of_several_threads_are_worked_on_together() -> None:
    batches: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        return [10 * item for item in items]

    gatherer = Gatherer(3, work, moment_s=0.2)
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(gatherer.do, range(7))) == [0, 10, 20, 30, 40, 50, 60]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(item for batch in batches for item in batch) == list(range(7))


def test_an_error_reaches_everybody_in_its_batch_and_nobody_else() -> None:
    together = threading.Barrier(2)

    def work(items: list[int]) -> list[int]:
        if 13 in items:
            raise FailedError("13")
        return items

    gatherer = Gatherer(2, work, moment_s=5)

    def fails(item: int) -> bool:
        together.wait(5)
        try:
            gatherer.do(item)
        except FailedError:
            return True
        return False

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(fails, (12, 13))) == [True, True]
        assert list(pool.map(fails, (1, 2))) == [False, False]
