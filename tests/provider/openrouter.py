"""OpenRouter's videos, as its documentation describes them: /api/v1/videos, asked for with JSON, answered 202."""

from __future__ import annotations

from typing import Any

from tests.provider.shop import Job, Order, Phase, Service, Shop, Trouble
from tests.provider.storage import content
from tests.provider.wire import Answer, Question, say

VIDEOS = "/api/v1/videos"
COST = 0.25  # dollars billed for every video
STATUS: dict[Phase, str] = {
    "queued": "pending",
    "running": "in_progress",
    "ready": "completed",
    "failed": "failed",
    "refused": "failed",
    "cancelled": "cancelled",
}


def answer(shop: Shop, question: Question) -> Answer:
    """Raises Trouble, Dropped."""
    if not question.holds_key():
        raise Trouble("key")
    if not question.path.startswith(VIDEOS):
        raise Trouble("lost")
    job_id, _, part = question.path.removeprefix(VIDEOS).strip("/").partition("/")
    match question.method, job_id, part:
        case "POST", "", "":
            job = shop.take(_order(question), prefix="job-")
            return say(202, {"id": job.id, "polling_url": _path(job), "status": "pending"})
        case "GET", job_id, "" if job_id:
            return say(200, _job(shop, shop.find("openrouter", job_id, question.path, polled=True), question.origin))
        case "GET", job_id, "content" if job_id:
            return content(shop, shop.find("openrouter", job_id, question.path))
    raise Trouble("lost")


def _order(question: Question) -> Order:
    fields = question.fields()
    if question.is_multipart or not fields.get("model"):
        raise Trouble("invalid")
    return Order("openrouter", str(fields.get("prompt") or ""), int(fields.get("seed") or 0), fields)


def _job(shop: Shop, job: Job, origin: str) -> dict[str, Any]:
    body: dict[str, Any] = {"id": job.id, "polling_url": _path(job), "status": STATUS[job.phase]}
    if job.phase == "ready":
        body |= {"generation_id": f"gen-{job.id}", "unsigned_urls": [f"{origin}{_path(job)}/content?index=0"]}
    if job.phase == "refused":
        body["error"] = "content_policy_violation: the prompt was flagged by the provider's moderation"
    if job.phase == "failed":
        body["error"] = "The provider failed to generate the video"
    if job.billed:
        body["usage"] = {"cost": COST, "is_byok": False}
    return body


def _path(job: Job) -> str:
    return f"/openrouter{VIDEOS}/{job.id}"


def _error(status: int, message: str, metadata: dict[str, Any] | None = None, **headers: str) -> Answer:
    about = {"metadata": metadata} if metadata else {}
    return say(status, {"error": {"code": status, "message": message} | about}, **headers)


SERVICE = Service(
    answer,
    {
        "key": _error(401, "No auth credentials found"),
        "busy": _error(429, "Rate limit exceeded", Retry_After="0"),
        "broken": _error(502, "Provider returned error"),
        "refused": _error(
            403,
            "Your chosen model requires moderation and your input was flagged",
            {"reasons": ["violence"], "flagged_input": "...", "provider_name": "Fake", "model_slug": "fake/video"},
        ),
        "lost": _error(404, "Job not found"),
        "invalid": _error(400, "Invalid input"),
    },
)
