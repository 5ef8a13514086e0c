"""The data half of a recipe: closed, frozen, torch-free sections.

`video`, `prompts`, `teacher`, `cache` and `stream` of the YAML are these classes; unknown keys are errors.
Each part of the program receives only its own section, never the whole recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """A section of a recipe: unknown keys and wrong types are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class VideoConfig(Config):
    """What every video of an experiment looks like: asked of the teacher, checked on arrival, made by the student."""

    width: int = Field(default=16, ge=8, le=4096, multiple_of=2, description="pixels")
    height: int = Field(default=16, ge=8, le=4096, multiple_of=2, description="pixels")
    frames: int = Field(default=12, ge=2, le=4096, description="pixel frames in a clip")
    fps: float = Field(default=8.0, ge=0.1, le=240, description="frames per second")
    lossless: bool = Field(
        default=False, description="RGB inside H.264, exact; chroma subsampling smears worlds of 16 to 32 pixels"
    )
    crf: int = Field(default=18, ge=0, le=51, description="H.264 quality where not lossless; lower is better")


class PromptsConfig(Config):
    """Where prompts come from and how they are split.

    Held out are the first by the hash of their text: their order in the source does not matter, but an added prompt
    can take the place of one that was held out.
    """

    source: str = Field(
        description="a txt, csv, jsonl or parquet file, hf://datasets/OWNER/NAME[@REVISION][/SPLIT], "
        "or `teacher` for a teacher that brings its own (captions of a folder)"
    )
    column: str = Field(default="prompt", description="column or key that holds the text (csv, jsonl, parquet, Hub)")
    limit: int | None = Field(default=None, ge=1, description="use only this many prompts of the source")
    validation: int = Field(
        default=0, ge=0, description="prompts held out for tuning and for the discriminator's check"
    )
    test: int = Field(default=0, ge=0, description="prompts held out for `afd eval`")
    test_source: str | None = Field(
        default=None, description="take evaluation prompts from here instead of holding out"
    )
    near_duplicate: float = Field(
        default=0.8, gt=0, le=1, description="Jaccard similarity of word triples from which two prompts count as one"
    )
    allow_leakage: bool = Field(default=False, description="go on although evaluation prompts occur in training")


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


class FolderConfig(Config):
    """Videos on disk with captions: any container, codec, size, rate and length."""

    name: Literal["folder"] = "folder"
    path: str = Field(description="folder that holds the videos")
    captions: str | None = Field(
        default=None,
        description="csv or jsonl with `file` and `caption`; default: captions.csv, captions.jsonl, x.txt beside x.mp4",
    )
    fit: Literal["crop", "pad"] = Field(default="crop", description="how another aspect ratio is met; never stretched")
    short: Literal["reject", "loop", "hold"] = Field(
        default="hold",
        description="a clip shorter than asked: reject it, play it backwards and forwards, or hold the last frame",
    )
    start: Literal["begin", "middle"] = Field(default="begin", description="which part of a longer clip is taken")
    licence: str = Field(default="unknown", description="licence of the videos, written into every sample and the card")
    distillation: Literal["allowed", "disallowed", "unknown"] = Field(
        default="unknown", description="whether the videos' terms allow distillation"
    )


TeacherConfig = Annotated[PlaygroundConfig | FolderConfig, Field(discriminator="name")]


class CacheConfig(Config):
    """How requests become shards."""

    folder: str | None = Field(default=None, description="where the cache lives; default OUT/cache")
    takes: int = Field(default=1, ge=1, le=99, description="videos asked for a training prompt")
    eval_takes: int = Field(default=1, ge=0, le=99, description="videos asked for a validation or test prompt")
    workers: int = Field(default=2, ge=1, le=256, description="requests in flight at once")
    shard_mb: float = Field(default=256.0, gt=0, description="a shard is sealed when its members reach this size")
    shard_samples: int = Field(default=1000, ge=1, description="or this many samples, whichever comes first")
    frozen: float = Field(
        default=0.1,
        ge=0,
        description="reject a video whose frames differ by less than this on average (8-bit levels)",
    )
    near_duplicate: int = Field(
        default=0,
        ge=-1,
        le=64,
        description="reject a video whose perceptual hash is within this many bits of another prompt's; -1: off",
    )


class StreamConfig(Config):
    """How shards become batches."""

    folder: str | None = Field(default=None, description="read another cache than this recipe's own")
    decoder: Literal["auto", "decord", "pyav"] = Field(
        default="auto", description="auto: decord where installed, else PyAV"
    )
    workers: int = Field(default=0, ge=0, le=64, description="decoding processes (spawned); 0 decodes in the trainer")
    memory_mb: int = Field(default=512, ge=0, description="decoded clips kept in memory")


class DataConfig(Config):
    """The sections that `afd_data` reads; `afd_train.config.Recipe` adds the rest of an experiment."""

    extends: str | None = Field(default=None, description="a recipe to start from (one parent; values here win)")
    out: str = Field(description="folder for everything the experiment writes; relative to where `afd` is run")
    seed: int = Field(default=0, ge=0, lt=2**31, description="every random number of the experiment follows from it")
    video: VideoConfig = VideoConfig()
    prompts: PromptsConfig
    teacher: TeacherConfig
    cache: CacheConfig = CacheConfig()
    stream: StreamConfig = StreamConfig()

    @model_validator(mode="after")
    def _prompts_fit_the_teacher(self) -> DataConfig:
        if self.prompts.source == "teacher" and self.teacher.name == "playground":
            raise ValueError(
                "prompts.source: the playground has no prompts of its own; name a file, "
                "for example `prompts/playground-one-ball.txt`"
            )
        return self
