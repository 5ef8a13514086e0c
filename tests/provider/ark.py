"""Ark, as `volcenginesdkarkruntime` (5.0) speaks it: /api/v3/contents/generations/tasks."""

from __future__ import annotations

from typing import Any

from tests.provider.shop import Job, Order, Phase, Service, Shop, Trouble
from tests.provider.storage import address
from tests.provider.wire import Answer, Question, say

TASKS = "/api/v3/contents/generations/tasks"
TOKENS = 100_000  # billed for every video
STATUS: dict[Phase, str] = {
    "queued": "queued",
    "running": "running",
    "ready": "succeeded",
    "failed": "failed",
    "refused": "failed",
    "cancelled": "cancelled",
}
ECHOED = ("service_tier", "execution_expires_after", "resolution", "ratio", "duration", "generate_audio", "priority")


def answer(shop: Shop, question: Question) -> Answer:
    """Raises Trouble, Dropped."""
    if not question.holds_key():
        raise Trouble("key")
    task_id = question.path.removeprefix(TASKS).strip("/")
    if not question.path.startswith(TASKS):
        raise Trouble("lost")
    match question.method, task_id:
        case "POST", "":
            job = shop.take(_order(question.fields()), prefix="cgt-")
            return say(200, {"id": job.id} | _token(job))
        case "GET", "":
            return _list(shop, question)
        case "GET", _:
            return say(200, _task(shop, shop.find("ark", task_id, question.path, polled=True), question.origin))
        case "DELETE", _:
            return _delete(shop, task_id, question)
    raise Trouble("invalid")


def _order(fields: dict[str, Any]) -> Order:
    texts = [part.get("text", "") for part in fields.get("content") or [] if part.get("type") == "text"]
    if not fields.get("model"):
        raise Trouble("invalid")
    seed = fields.get("seed")
    return Order(
        "ark", "\n".join(texts), 0 if seed is None else int(seed), fields, fields.get("safety_identifier") or ""
    )


def _list(shop: Shop, question: Question) -> Answer:
    wanted = {name.removeprefix("filter."): values for name, values in question.query.items() if name[:7] == "filter."}
    jobs = [job for job in shop.of("ark") if _passes(job, wanted)]
    size = min(question.number("page_size", 10), shop.longest_page)
    start = (question.number("page_num", 1) - 1) * size
    items = [_task(shop, job, question.origin) for job in jobs[start : start + size]]
    return say(200, {"total": len(jobs), "items": items})


def _passes(job: Job, wanted: dict[str, list[str]]) -> bool:
    facts = {"status": STATUS[job.phase], "task_ids": job.id, "model": job.order.fields["model"],
             "service_tier": job.order.fields.get("service_tier") or "default"}  # fmt: skip
    return all(facts[name] in values for name, values in wanted.items() if name in facts)


def _delete(shop: Shop, task_id: str, question: Question) -> Answer:
    """A queued task is cancelled, a finished one forgotten; a running one stays."""
    job = shop.find("ark", task_id, question.path)
    with shop.lock:
        if job.phase == "running":
            return _error(409, "InvalidAction.RunningTaskDeletion", "Conflict", "A running task cannot be deleted.")
        if job.phase == "queued":
            job.cancelled = True
        else:
            del shop.jobs[task_id]
    return say(200, {})


def _task(shop: Shop, job: Job, origin: str) -> dict[str, Any]:
    video, fields = shop.footage.video, job.order.fields
    task: dict[str, Any] = {
        "id": job.id,
        "model": fields["model"],
        "status": STATUS[job.phase],
        "created_at": int(job.created_at),
        "updated_at": int(job.created_at) + 1,
        "service_tier": "default",
        "execution_expires_after": 172_800,
    }
    task |= {name: fields[name] for name in ECHOED if fields.get(name) is not None} | _token(job)
    if job.phase == "ready":
        task |= {"content": {"video_url": address(shop, job, origin, "Tos")}, "seed": job.order.seed,
                 "framespersecond": round(video.fps), "frames": video.frames}  # fmt: skip
    if job.phase == "refused":
        reason = "The request failed because the output video may contain sensitive information."
        task["error"] = {"code": "OutputVideoSensitiveContentDetected", "message": reason}
    if job.phase == "failed":
        task["error"] = {"code": "InternalServiceError", "message": "The service encountered an internal error."}
    if job.billed:
        task["usage"] = {"completion_tokens": TOKENS, "total_tokens": TOKENS}
    return task


def _token(job: Job) -> dict[str, str]:
    return {"safety_identifier": job.order.token} if job.order.token else {}


def _error(status: int, code: str, kind: str, message: str, **headers: str) -> Answer:
    text = f"{message} Request id: 0217000000000000"
    return say(status, {"error": {"code": code, "message": text, "param": "", "type": kind}}, **headers)


SERVICE = Service(
    answer,
    {
        "key": _error(401, "AuthenticationError", "Unauthorized", "The API key in the request is missing or invalid."),
        "busy": _error(
            429, "RateLimitExceeded.EndpointRPMExceeded", "TooManyRequests", "RPM exceeded.", Retry_After="0"
        ),
        "broken": _error(500, "InternalServiceError", "InternalServerError", "The service failed."),
        "refused": _error(
            400,
            "InputTextSensitiveContentDetected",
            "BadRequest",
            "The request failed because the input text may contain sensitive information.",
        ),
        "lost": _error(404, "NotFound", "NotFound", "The specified task does not exist."),
        "invalid": _error(400, "InvalidParameter", "BadRequest", "A parameter of the request is not valid."),
    },
)
