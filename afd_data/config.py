"""The data half of a recipe: closed, frozen, torch-free sections.

`video`, `prompts`, `teacher`, `cache` and `stream` of the YAML are these classes; unknown keys are errors.
Each part of the program receives only its own section, never the whole recipe.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from afd_data.provider_config import ArkConfig, FalConfig, RunwayConfig, VideosConfig
from afd_data.section import Config
from afd_data.teacher_config import CommandConfig, FolderConfig, HubConfig, LocalConfig, PlaygroundConfig


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

    Held out are the first by the hash of their text, so that their order in the source does not matter.  What a cache
    holds keeps its split when the source grows; new prompts are held out only where places are free.
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


TeacherConfig = Annotated[
    PlaygroundConfig
    | FolderConfig
    | LocalConfig
    | CommandConfig
    | HubConfig
    | ArkConfig
    | VideosConfig
    | FalConfig
    | RunwayConfig,
    Field(discriminator="name"),
]


BRING_PROMPTS = ("folder", "hub")  # teachers whose captions are prompts


class CacheConfig(Config):
    """How requests become shards."""

    folder: str | None = Field(
        default=None, description="where the cache lives, journal and spool included: a local disk; default OUT/cache"
    )
    storage: str | None = Field(
        default=None,
        description="where sealed shards, index and manifest go instead, any fsspec address: s3://BUCKET/NAME, gs://...",
    )
    takes: int = Field(default=1, ge=1, le=99, description="videos asked for a training prompt")
    eval_takes: int = Field(default=1, ge=0, le=99, description="videos asked for a validation or test prompt")
    workers: int = Field(default=2, ge=1, le=256, description="requests in flight at once")
    engine: Literal["threads", "ray"] = Field(
        default="threads", description="where they are made: here, or on a cluster"
    )
    partitions: int = Field(default=2, ge=1, le=1000, description="shares of the work that a cluster does side by side")
    ray_address: str | None = Field(default=None, description="of the Ray cluster; null: RAY_ADDRESS, else one here")
    poll_s: float = Field(default=10.0, gt=0, description="longest wait between two looks at a job")
    max_cost: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="ask for nothing that could bring the spend beyond this, counting what is in flight or unknown; "
        "in the teacher's currency",
    )
    stop_after_failures: int = Field(
        default=10,
        ge=1,
        description="requests that fail, or paid videos that are turned down, one after the other before the run stops",
    )
    longest_job_hours: float = Field(
        default=48.0,
        gt=0,
        description="an older job of which no video came is given up, as what follows it cannot be sealed before",
    )
    journal: Literal["auto", "wal", "rollback"] = Field(
        default="auto", description="SQLite's mode; auto: rollback on network file systems, else write-ahead log"
    )
    shard_mb: float = Field(default=256.0, gt=0, description="a shard is sealed when its members reach this size")
    shard_samples: int = Field(default=1000, ge=1, description="or this many samples, whichever comes first")
    frozen: float = Field(
        default=0.1,
        ge=0,
        description="reject a video whose frames differ by less than this on average (8-bit levels)",
    )
    black: float = Field(
        default=2.0, ge=0, description="reject a video in which no pixel is brighter than this (8-bit levels)"
    )
    audio: Literal["drop", "keep"] = Field(default="drop", description="what becomes of sound")
    near_duplicate: int = Field(
        default=0,
        ge=-1,
        le=64,
        description="reject a video whose perceptual hash is within this many bits of another prompt's; -1: off",
    )


class RefreshConfig(Config):
    """Which training videos a refresh asks for again, and when; every round is a new generation beside the old.

    Validation and test videos stay what they are, so that results of different rounds can be compared.
    """

    older_than_days: float | None = Field(default=None, ge=0, description="videos older than this are due")
    fraction: float = Field(default=0.0, ge=0, le=1, description="share of the videos due in a round, the oldest first")
    hardest: float = Field(
        default=0.0, ge=0, le=1, description="share of the prompts due, those where the student is furthest behind"
    )
    margins: str | None = Field(
        default=None,
        description="parquet with the discriminator's margin of each prompt; default OUT/train/margins.parquet",
    )
    changed_teacher: bool = Field(default=True, description="all videos of another teacher version or setting are due")
    new_prompts: bool = Field(default=True, description="prompts that were added to the source are due")
    keep_generations: int = Field(
        default=2,
        ge=1,
        description="newest generations that stay readable; older videos that no trainer uses are pruned",
    )
    schedule: str | None = Field(
        default=None, description="cron expression in local time, for example `0 3 * * 1`; used by --watch"
    )

    @model_validator(mode="after")
    def _schedule_is_cron(self) -> RefreshConfig:
        if self.schedule is not None:
            from cronsim import CronSim, CronSimError

            try:
                CronSim(self.schedule, datetime.now())
            except CronSimError as error:
                raise ValueError(
                    f"schedule: {self.schedule!r} is not a cron expression ({error}); for example `0 3 * * 1`"
                ) from None
        return self


class StreamConfig(Config):
    """How shards become batches."""

    folder: str | None = Field(
        default=None,
        description="read another cache than this recipe's own: a folder, hf://datasets/OWNER/NAME[@REVISION], s3://...",
    )
    follow: bool = Field(
        default=True, description="go over to a newer generation of the cache when a checkpoint is saved"
    )
    disk_mb: int = Field(default=50_000, ge=1, description="copies of remote samples kept on the local disk")
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
    refresh: RefreshConfig = RefreshConfig()
    stream: StreamConfig = StreamConfig()

    @model_validator(mode="after")
    def _prompts_fit_the_teacher(self) -> DataConfig:
        if self.prompts.source == "teacher" and self.teacher.name not in BRING_PROMPTS:
            raise ValueError(
                f"prompts.source: {self.teacher.name} has no prompts of its own; name a file of them, "
                "for example --set prompts.source=prompts.txt"
            )
        return self

    @model_validator(mode="after")
    def _videos_are_long_enough(self) -> DataConfig:
        teacher, wanted_s = self.teacher, self.video.frames / self.video.fps
        if (
            isinstance(teacher, ArkConfig | RunwayConfig)
            and teacher.short == "reject"
            and teacher.duration_s < wanted_s
        ):
            raise ValueError(
                f"teacher.duration_s: {teacher.duration_s} s are asked for, and {self.video.frames} frames at "
                f"{self.video.fps:g} fps are {wanted_s:.2f} s: every video would be paid for and rejected. "
                "Raise it, or set teacher.short=hold"
            )
        return self
