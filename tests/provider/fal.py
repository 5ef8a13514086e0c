"""fal's queue, as `fal_client` (1.0) speaks it: OWNER/APP[/...], and requests/ID below OWNER/APP.

A request that failed is COMPLETED like any other; its result is the error.
"""

from __future__ import annotations

from typing import Any

from tests.provider.shop import Job, Order, Service, Shop, Trouble
from tests.provider.storage import address
from tests.provider.wire import Answer, Question, say


def answer(shop: Shop, question: Question) -> Answer:
    """Raises Trouble, Dropped."""
    if not question.holds_key("Key"):
        raise Trouble("key")
    parts = question.path.strip("/").split("/")
    if "requests" not in parts:
        if question.method != "POST" or len(parts) < 2:
            raise Trouble("invalid")
        job = shop.take(_order(question, "/".join(parts)))
        return say(200, {"status": "IN_QUEUE", "queue_position": 0} | _urls(job, question.origin))
    if parts[2] != "requests":
        return say(405, {"detail": "Method Not Allowed"})  # requests are those of OWNER/APP, whatever was below it
    match question.method, parts[3:]:
        case "GET", [job_id, "status"]:
            job = shop.find("fal", job_id, question.path, polled=True)
            return say(200 if job.phase == "ready" else 202, _status(job, question.origin))
        case "GET", [job_id] | [job_id, "response"]:
            return _result(shop, shop.find("fal", job_id, question.path), question.origin)
        case "PUT", [job_id, "cancel"]:
            return _cancel(shop, shop.find("fal", job_id, question.path))
    raise Trouble("lost")


def _order(question: Question, app: str) -> Order:
    fields = question.fields()
    seed = int(fields.get("seed") or 0)
    return Order("fal", str(fields.get("prompt") or ""), seed, fields | {"app": app})


def _urls(job: Job, origin: str) -> dict[str, str]:
    owner, app, *_ = job.order.fields["app"].split("/")
    base = f"{origin}/fal/{owner}/{app}/requests/{job.id}"
    return {
        "request_id": job.id,
        "response_url": base,
        "status_url": f"{base}/status",
        "cancel_url": f"{base}/cancel",
    }


def _status(job: Job, origin: str) -> dict[str, Any]:
    match job.phase:
        case "queued":
            facts: dict[str, Any] = {"status": "IN_QUEUE", "queue_position": 0}
        case "running":
            facts = {"status": "IN_PROGRESS", "logs": []}
        case _:
            facts = {"status": "COMPLETED", "logs": [], "metrics": {"inference_time": 0.1}}
    if job.phase in ("failed", "cancelled"):
        facts |= {"error": "The runner failed", "error_type": "runner_server_error"}
    return facts | _urls(job, origin)


def _result(shop: Shop, job: Job, origin: str) -> Answer:
    match job.phase:
        case "queued" | "running":
            return say(400, {"detail": "Request is still in progress"})
        case "refused":
            return _refusal()
        case "failed" | "cancelled":
            return say(500, {"detail": "The runner failed", "error_type": "runner_server_error"})
    video = {"url": address(shop, job, origin), "content_type": "video/mp4", "file_name": "video.mp4"}
    return say(200, {"video": video, "seed": job.order.seed})


def _cancel(shop: Shop, job: Job) -> Answer:
    with shop.lock:
        if job.phase != "queued":
            return say(400, {"status": "ALREADY_COMPLETED"})
        job.cancelled = True
    return say(202, {"status": "CANCELLATION_REQUESTED"})


def _refusal() -> Answer:
    fault = {
        "loc": ["body", "prompt"],
        "msg": "The content could not be processed because it contained material flagged by a content checker.",
        "type": "content_policy_violation",
        "url": "https://docs.fal.ai/errors#content_policy_violation",
    }
    return say(422, {"detail": [fault]}, X_Fal_Retryable="false")


SERVICE = Service(
    answer,
    {
        "key": say(
            401, {"detail": "Cannot access application. Authentication is required to access this application."}
        ),
        "busy": say(429, {"detail": "Too many requests"}, Retry_After="0"),
        "broken": say(500, {"detail": "Internal Server Error", "error_type": "internal_error"}),
        "refused": _refusal(),
        "lost": say(404, {"detail": "Request not found"}),
        "invalid": say(422, {"detail": [{"loc": ["body", "prompt"], "msg": "field required", "type": "missing"}]}),
    },
)
