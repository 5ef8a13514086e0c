"""The teachers that a recipe can name and that run here: embedded, on disk, a pipeline, a program, a dataset.

Teachers behind an HTTP API are in `provider_config`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from afd_data.section import Config

Distillation = Literal["allowed", "disallowed", "unknown"]


class Terms(Config):
    """What one may do with the videos; written into every sample and the card."""

    licence: str = Field(default="unknown", description="licence of the videos")
    distillation: Distillation = Field(
        default="unknown", description="whether the videos' terms allow distillation; `disallowed` is never pushed"
    )
    terms_url: str = Field(default="", description="where these terms are written")


class Adaptation(Config):
    """How a delivered video of another size, rate or length becomes the one that the recipe asks for."""

    fit: Literal["crop", "pad"] = Field(default="crop", description="how another aspect ratio is met; never stretched")
    short: Literal["reject", "loop", "hold"] = Field(
        default="hold",
        description="a clip shorter than asked: reject it, play it backwards and forwards, or hold the last frame",
    )
    start: Literal["begin", "middle"] = Field(default="begin", description="which part of a longer clip is taken")


class FlawsConfig(Config):
    """How often the playground breaks its own physics; all 0 is the exact teacher, other values make sloppy corpora."""

    wrong_gravity: float = Field(default=0.0, ge=0, le=1, description="share of videos with another gravity")
    wrong_bounce: float = Field(default=0.0, ge=0, le=1, description="share of videos with another restitution")
    drag: float = Field(default=0.0, ge=0, le=1, description="share of videos with air drag")
    jitter: float = Field(default=0.0, ge=0, description="position noise in radii, every frame")
    pass_through: float = Field(default=0.0, ge=0, le=1, description="share of videos whose bodies pass through walls")
    vanish: float = Field(
        default=0.0, ge=0, le=1, description="share of videos in which a body disappears for some frames"
    )


class PlaygroundConfig(Config):
    """An embedded 2-D rigid-body world that draws what a prompt says; free, exact, and it knows its own physics."""

    name: Literal["playground"] = "playground"
    flaws: FlawsConfig = FlawsConfig()
    determined: bool = Field(
        default=False,
        description="the prompt fixes the whole video: starts in the middle of their range, a smooth floor",
    )


class FolderConfig(Adaptation, Terms):
    """Videos on disk with captions: any container, codec, size, rate and length."""

    name: Literal["folder"] = "folder"
    path: str = Field(description="folder that holds the videos")
    captions: str | None = Field(
        default=None,
        description="csv or jsonl with `file` and `caption`; default: captions.csv, captions.jsonl, x.txt beside x.mp4",
    )


class LocalConfig(Adaptation, Terms):
    """Any text-to-video pipeline of diffusers, on this machine's GPU or CPU."""

    name: Literal["local"] = "local"
    model: str = Field(description="folder of a diffusers pipeline, or its name on the Hub (OWNER/NAME[@REVISION])")
    steps: int = Field(default=50, ge=1, description="denoising steps")
    guidance: float | None = Field(
        default=5.0, ge=0, description="classifier-free guidance scale; null: the pipeline's own"
    )
    negative_prompt: str = Field(default="", description="what the video should not show")
    batch: int = Field(
        default=1, ge=1, le=256, description="videos drawn together; cache.workers of at least twice that many"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="auto: bfloat16 on an accelerator, float32 on a CPU"
    )
    offload: bool = Field(
        default=False, description="keep the parts that do not work in main memory: slower, for small GPUs"
    )
    options: dict[str, Any] = Field(
        default={}, description="further arguments of the pipeline's call; height, width and num_frames too"
    )


class CommandConfig(Adaptation, Terms):
    """Any program: prompt in, video file out."""

    name: Literal["command"] = "command"
    argv: tuple[str, ...] = Field(
        min_length=1,
        description="program and arguments, run without a shell; {prompt}, {seed}, {output}, {width}, {height}, "
        "{frames}, {fps} and {take} are filled in, and {{ }} stand for braces",
    )
    version: str = Field(default="1", description="change it when the program would draw other videos")
    timeout_s: float = Field(default=3600.0, gt=0, description="a run that takes longer is killed and has failed")


class HubConfig(Adaptation, Terms):
    """A video dataset on the Hub, or tars and parquet files of one on disk; its captions are the prompts."""

    name: Literal["hub"] = "hub"
    dataset: str = Field(description="OWNER/NAME[@REVISION] on the Hub, or a folder of tar or parquet files")
    config: str | None = Field(default=None, description="configuration of the dataset, where it has several")
    split: str = Field(default="train", description="split of the dataset that is read")
    video: str = Field(default="mp4", description="column that holds the video")
    caption: str = Field(default="json.prompt", description="column that holds the caption; a dot enters a record")
    limit: int | None = Field(default=None, ge=1, description="use only the first rows")
