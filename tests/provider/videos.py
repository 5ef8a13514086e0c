"""/v1/videos, as `openai` (3.54) speaks it, and as self-hosted servers do.

| service | orders as | key | while it runs | errors |
|---|---|---|---|---|
| videos | JSON or multipart | needed | in_progress | OpenAI's |
| vllm-omni | multipart | if any, the right one | in_progress | `detail` |
| sglang | JSON (multipart needs a picture) | the same | queued | `detail` |
| fastvideo | JSON or multipart, seed 1024 by default in the latter | the same | queued | `detail` |
"""

from __future__ import annotations

from typing import Any

from tests.provider.shop import Job, Kind, Order, Phase, Service, Shop, Trouble, shape_of
from tests.provider.storage import content
from tests.provider.wire import Answer, Question, say

VIDEOS = "/v1/videos"
PREFIX = {"videos": "video_", "vllm-omni": "video_gen_", "sglang": "", "fastvideo": ""}
FORM_SEED = {"fastvideo": 1024}
STATUS: dict[Phase, str] = {
    "queued": "queued",
    "running": "in_progress",
    "ready": "completed",
    "failed": "failed",
    "refused": "failed",
    "cancelled": "failed",
}


def _service(name: str, errors: dict[Kind, Answer]) -> Service:
    return Service(lambda shop, question: _answer(name, shop, question), errors)


def _answer(name: str, shop: Shop, question: Question) -> Answer:
    """Raises Trouble, Dropped."""
    keyless = name != "videos" and "authorization" not in question.headers
    if not keyless and not question.holds_key():
        raise Trouble("key")
    if not question.path.startswith(VIDEOS):
        raise Trouble("lost")
    video_id, _, part = question.path.removeprefix(VIDEOS).strip("/").partition("/")
    match question.method, video_id, part:
        case "POST", "", "":
            return say(200, _video(name, shop, shop.take(_order(name, question), PREFIX[name]), "queued"))
        case "GET", "", "":
            return _list(name, shop, question)
        case "GET", _, "":
            job = shop.find(name, video_id, question.path, polled=True)
            return say(200, _video(name, shop, job, job.phase))
        case "GET", _, "content":
            return content(shop, shop.find(name, video_id, question.path))
        case "DELETE", _, "":
            job = shop.find(name, video_id, question.path)
            with shop.lock:
                del shop.jobs[video_id]
            if name in ("sglang", "fastvideo"):
                return say(200, _video(name, shop, job, job.phase) | {"status": "deleted"})
            return say(200, {"id": video_id, "object": "video.deleted", "deleted": True})
    raise Trouble("lost")


def _order(name: str, question: Question) -> Order:
    fields = question.fields()
    if name == "vllm-omni" and not question.is_multipart:
        raise Trouble("invalid")
    if name == "sglang" and question.is_multipart and "input_reference" not in fields:
        raise Trouble("invalid")
    for extra in ("extra_body", "extra_json"):
        if isinstance(fields.get(extra), dict):
            fields = fields | fields[extra]
    default = FORM_SEED.get(name, 0) if question.is_multipart else 0
    return Order(name, str(fields.get("prompt") or ""), int(fields.get("seed") or default), fields)


def _list(name: str, shop: Shop, question: Question) -> Answer:
    jobs = shop.of(name)
    if question.query.get("order") == ["asc"]:
        jobs.reverse()
    after = question.query.get("after", [""])[0]
    ids = [job.id for job in jobs]
    start = ids.index(after) + 1 if after in ids else 0
    limit = question.number("limit", 20)
    page = [_video(name, shop, job, job.phase) for job in jobs[start : start + limit]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return say(200, {"object": "list", "data": page, "has_more": start + limit < len(jobs)} | ends)


def _video(name: str, shop: Shop, job: Job, phase: Phase) -> dict[str, Any]:
    status = "queued" if name in ("sglang", "fastvideo") and phase == "running" else STATUS[phase]
    video: dict[str, Any] = {
        "id": job.id,
        "object": "video",
        "model": job.order.fields.get("model") or "fake-video",
        "prompt": job.order.prompt,
        "status": status,
        "progress": {"queued": 0, "in_progress": 50}.get(status, 100),
        "created_at": int(job.created_at),
        "completed_at": int(job.created_at) + 1 if status == "completed" else None,
        "error": None,
    } | shape_of(shop.footage.video)
    if phase == "refused":
        video["error"] = {"code": "moderation_blocked", "message": "Your request was blocked by our moderation system."}
    if phase in ("failed", "cancelled"):
        video["error"] = {"code": "server_error", "message": "The generation failed."}
    return video


def _openai_error(status: int, code: str, message: str, kind: str = "invalid_request_error", **headers: str) -> Answer:
    return say(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, **headers)


OPENAI_ERRORS: dict[Kind, Answer] = {
    "key": _openai_error(401, "invalid_api_key", "Incorrect API key provided."),
    "busy": _openai_error(429, "rate_limit_exceeded", "Rate limit reached.", "requests", Retry_After="0"),
    "broken": _openai_error(500, "server_error", "The server had an error.", "server_error"),
    "refused": _openai_error(400, "moderation_blocked", "Your request was blocked by our moderation system."),
    "lost": _openai_error(404, "not_found", "No such video."),
    "invalid": _openai_error(400, "missing_required_parameter", "Missing required parameter: 'prompt'."),
}
DETAIL_ERRORS: dict[Kind, Answer] = {
    "key": say(401, {"error": "Unauthorized"}),
    "busy": say(429, {"detail": "Too many requests"}, Retry_After="0"),
    "broken": Answer(500, b"Internal Server Error", "text/plain"),
    "refused": say(400, {"detail": "content_policy_violation: the prompt was blocked by the moderation filter"}),
    "lost": say(404, {"detail": "Video not found"}),
    "invalid": say(422, {"detail": [{"type": "missing", "loc": ["body", "prompt"], "msg": "Field required"}]}),
}
SERVICES = {"videos": _service("videos", OPENAI_ERRORS)} | {
    name: _service(name, DETAIL_ERRORS) for name in ("vllm-omni", "sglang", "fastvideo")
}
