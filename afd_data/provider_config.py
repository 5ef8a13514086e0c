"""The teachers that a recipe can name and that answer over HTTP.  Keys come from environment variables only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from afd_data.section import Config
from afd_data.teacher_config import Adaptation, Terms


class TrafficConfig(Config):
    """How much a provider is asked at a time, and how patiently."""

    requests_per_minute: float | None = Field(default=None, gt=0, description="new videos asked for in a minute")
    downloads: int = Field(
        default=4, ge=1, le=64, description="videos downloaded at once; first those that expire first"
    )
    timeout_s: float = Field(default=60.0, gt=0, description="longest silence of the provider in a request")
    attempts: int = Field(
        default=6, ge=1, le=100, description="tries of what may be tried again: reading, and orders that did not arrive"
    )
    longest_wait_s: float = Field(default=300.0, gt=0, description="between two tries, whatever Retry-After says")
    max_video_mb: float = Field(default=2048.0, gt=0, description="a larger download is broken off")


class ProviderConfig(Adaptation, Terms):
    """What all of them have."""

    base_url: str = Field(description="address of the API")
    key_variable: str | None = Field(description="environment variable that holds the key; null: none is sent")
    price: float = Field(
        default=0.0, ge=0, description="estimated price of a video, where the provider's own numbers do not give one"
    )
    currency: str = Field(default="USD", description="of all prices")
    version: str = Field(default="1", description="change it when the provider changed its model behind the same name")
    traffic: TrafficConfig = TrafficConfig()


class ArkConfig(ProviderConfig):
    """Seedance on the Ark protocol: BytePlus ModelArk, or Volcengine (https://ark.cn-beijing.volces.com/api/v3)."""

    name: Literal["ark"] = "ark"
    base_url: str = "https://ark.ap-southeast.bytepluses.com/api/v3"
    key_variable: str | None = "ARK_API_KEY"
    model: str = Field(description="model or endpoint id")
    resolution: str = Field(default="480p", pattern=r"^(\d{3,4}p|[24]k)$", description="480p, 720p, 1080p, 2k, 4k")
    ratio: str = Field(default="16:9", description="aspect ratio")
    duration_s: int = Field(default=5, ge=1, le=60, description="seconds asked for")
    audio: bool = Field(default=False, description="have sound made, which costs more")
    watermark: bool = Field(default=False, description="have a watermark put in")
    service_tier: Literal["default", "flex"] = Field(default="default", description="flex: cheaper and later")
    options: dict[str, Any] = Field(default={}, description="further fields of the order; null leaves one out")
    price_per_million_tokens: float = Field(default=0.0, ge=0, description="what the provider bills by")
    short: Literal["reject", "loop", "hold"] = "reject"


class VideosConfig(ProviderConfig):
    """Servers of the /v1/videos protocol: self-hosted ones (free), OpenRouter (paid) and gateways (taken for paid)."""

    name: Literal["videos"] = "videos"
    dialect: Literal["vllm-omni", "sglang", "fastvideo", "openrouter", "generic"] = Field(
        default="generic", description="how the server spells its options and states"
    )
    key_variable: str | None = None
    model: str | None = Field(default=None, description="model's name; null: the server has one")
    encoding: Literal["auto", "json", "multipart"] = Field(default="auto", description="of the order; auto: by dialect")
    paid: bool | None = Field(default=None, description="whether orders cost money; null: by dialect")
    seconds: int | None = Field(default=None, ge=1, description="length asked for, where frames cannot be")
    size: str | None = Field(
        default=None, pattern=r"^\d+x\d+$", description="WIDTHxHEIGHT asked for; null: the recipe's"
    )
    states: dict[str, Literal["queued", "running", "ready", "failed", "refused"]] = Field(
        default={}, description="what further words of this server mean, for example {baking: running}"
    )
    options: dict[str, Any] = Field(default={}, description="further fields of the order; null leaves one out")
    short: Literal["reject", "loop", "hold"] = "reject"


class FalConfig(ProviderConfig):
    """fal.ai's queue: Seedance, Veo, Kling and others."""

    name: Literal["fal"] = "fal"
    base_url: str = "https://queue.fal.run"
    key_variable: str | None = "FAL_KEY"
    app: str = Field(description="for example bytedance/seedance-2.0/text-to-video")
    options: dict[str, Any] = Field(
        default={}, description="further fields of the order: resolution, duration ...; null leaves one out"
    )
    short: Literal["reject", "loop", "hold"] = "reject"


class RunwayConfig(ProviderConfig):
    """Runway's API: one protocol for Gen-4.5, Veo, Kling, Seedance, Hailuo."""

    name: Literal["runway"] = "runway"
    base_url: str = "https://api.dev.runwayml.com"
    key_variable: str | None = "RUNWAYML_API_SECRET"
    model: str = Field(description="for example veo3.1 or seedance2")
    ratio: str = Field(default="1280:720", description="WIDTH:HEIGHT")
    duration_s: int = Field(default=5, ge=1, le=60, description="seconds asked for")
    price_per_credit: float = Field(default=0.01, ge=0, description="what a credit costs")
    options: dict[str, Any] = Field(default={}, description="further fields of the order; null leaves one out")
    short: Literal["reject", "loop", "hold"] = "reject"
