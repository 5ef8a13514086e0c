"""Runway's API, as `runwayml` (5.24) speaks it: /v1/text_to_video and /v1/tasks/ID; bills in credits."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tests.provider.shop import Job, Order, Service, Shop, Trouble
from tests.provider.storage import address
from tests.provider.wire import Answer, Question, say

CREDITS = 25  # billed for every video
VERSION = "2024-11-06"


def answer(shop: Shop, question: Question) -> Answer:
    """Raises Trouble, Dropped."""
    if not question.holds_key():
        raise Trouble("key")
    if question.headers.get("x-runway-version") != VERSION:
        return say(400, {"error": "The X-Runway-Version header is missing or not valid."})
    match question.method, question.path.strip("/").split("/"):
        case "POST", ["v1", "text_to_video"]:
            job = shop.take(_order(question))
            return say(200, {"id": job.id, "estimatedCost": {"credits": CREDITS}})
        case "GET", ["v1", "tasks", job_id]:
            return say(200, _task(shop, shop.find("runway", job_id, question.path, polled=True), question.origin))
        case "DELETE", ["v1", "tasks", job_id]:
            return _delete(shop, shop.find("runway", job_id, question.path))
    raise Trouble("lost")


def _order(question: Question) -> Order:
    fields = question.fields()
    if not fields.get("model"):
        raise Trouble("invalid")
    return Order("runway", str(fields.get("promptText") or ""), int(fields.get("seed") or 0), fields)


def _task(shop: Shop, job: Job, origin: str) -> dict[str, Any]:
    created_at = datetime.fromtimestamp(job.created_at, UTC).isoformat().replace("+00:00", "Z")
    task: dict[str, Any] = {"id": job.id, "createdAt": created_at}
    running = {"estimatedCost": {"credits": CREDITS}}
    ended = {"cost": {"credits": CREDITS if job.billed else 0}}
    match job.phase:
        case "queued":
            return task | running | {"status": "PENDING" if job.polls < 2 else "THROTTLED"}
        case "running":
            return task | running | {"status": "RUNNING", "progress": 0.5}
        case "ready":
            return task | ended | {"status": "SUCCEEDED", "output": [address(shop, job, origin)]}
        case "cancelled":
            return task | ended | {"status": "CANCELLED"}
        case "refused":
            fault = {"failure": "The prompt did not pass our moderation.", "failureCode": "SAFETY.INPUT.TEXT"}
        case "failed":
            fault = {"failure": "An unexpected error occurred.", "failureCode": "INTERNAL.BAD_OUTPUT.CODE01"}
    return task | ended | {"status": "FAILED"} | fault


def _delete(shop: Shop, job: Job) -> Answer:
    with shop.lock:
        if job.phase in ("queued", "running"):
            job.cancelled = True
        else:
            del shop.jobs[job.id]
    return Answer(204)


SERVICE = Service(
    answer,
    {
        "key": say(401, {"error": "The API key is missing or not valid."}),
        "busy": say(429, {"error": "You have made too many requests."}, Retry_After="0"),
        "broken": say(500, {"error": "An internal error occurred."}),
        "refused": say(400, {"error": "The prompt did not pass our moderation.", "failureCode": "SAFETY.INPUT.TEXT"}),
        "lost": say(404, {"error": "Task not found"}),
        "invalid": say(
            400,
            {"error": "Validation of body failed", "issues": [{"path": ["promptText"], "message": "Required"}]},
        ),
    },
)
