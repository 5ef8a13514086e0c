"""Where finished videos lie: signed addresses that expire, and downloads that go wrong (`shop` says how)."""

from __future__ import annotations

import hashlib
import hmac
import time

from tests.provider.shop import Job, Shop, Trouble
from tests.provider.wire import Answer, Question

LIFETIME_S = 24 * 3600
HTML = b"<!DOCTYPE html>\n<html><body>Please log in.</body></html>\n"


def address(shop: Shop, job: Job, origin: str, vendor: str = "Amz") -> str:
    """A new signed address of the video, on a host other than the API's, as storage has."""
    with shop.lock:
        job.addresses += 1
        expired = job.order.mode == "expired" and job.addresses == 1
    signed_at = time.time() - (LIFETIME_S + 60 if expired else 0)
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(signed_at))
    deadline = int(signed_at) + LIFETIME_S
    query = f"X-{vendor}-Date={date}&X-{vendor}-Expires={LIFETIME_S}"
    host = origin.replace("127.0.0.1", "localhost")
    return f"{host}/files/{job.id}.mp4?{query}&X-{vendor}-Signature={_signature(job.id, deadline)}"


def download(shop: Shop, question: Question) -> Answer:
    """What is answered for such an address."""
    job = shop.jobs.get(question.path.removeprefix("/files/").removesuffix(".mp4"))
    signature = next((value[0] for name, value in question.query.items() if name.endswith("-Signature")), "")
    deadline = signature.partition("-")[0]
    if job is None or not deadline.isdigit() or signature != _signature(job.id, int(deadline)):
        return _error(403, "SignatureDoesNotMatch")
    if "authorization" in question.headers:
        return _error(400, "InvalidArgument: Only one auth mechanism allowed")
    try:
        shop.stumble(job, question.path)
    except Trouble:
        return _error(500, "InternalError")
    if int(deadline) < time.time():
        return _error(403, "AccessDenied: Request has expired")
    return _error(404, "NoSuchKey") if job.order.mode == "gone" else _video(shop, job)


def content(shop: Shop, job: Job) -> Answer:
    """What a service answers that sends the video itself; its address stays, so `expired` is for the first GET.

    Raises Trouble.
    """
    if job.phase != "ready" or job.order.mode == "gone":
        raise Trouble("lost")
    with shop.lock:
        job.addresses += 1
        if job.order.mode == "expired" and job.addresses == 1:
            return _error(403, "AccessDenied: Request has expired")
    return _video(shop, job)


def _video(shop: Shop, job: Job) -> Answer:
    with shop.lock:
        job.downloads += 1
        mode = job.order.mode if job.downloads == 1 else "ok"
    if mode == "html":
        return Answer(200, HTML, "text/html")
    mp4 = shop.footage.read(job.order.prompt, job.order.seed)
    match mode:
        case "truncated":
            return Answer(200, mp4, "video/mp4", fate="cut")
        case "truncated-silently":
            return Answer(200, mp4, "video/mp4", fate="unsized")
    return Answer(200, mp4, "video/mp4")


def _signature(job_id: str, deadline: int) -> str:
    """Holds the deadline, so that nothing need be remembered."""
    return f"{deadline}-{hmac.new(b'storage', f'{job_id}/{deadline}'.encode(), hashlib.sha256).hexdigest()[:32]}"


def _error(status: int, code: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>'
    return Answer(status, body.encode(), "application/xml")
