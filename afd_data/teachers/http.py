"""The only way to the network for teachers behind HTTP: nothing that may have arrived is ever sent twice.

An *order* (POST) costs money.  It goes out on a connection of its own and is tried again only where it certainly did
not arrive: no connection came about, or the provider said 429.  A *question* (GET) may be asked again, and is.  The key
goes to paths below `base_url` and nowhere else.  Texts of errors name neither keys nor the queries of signed addresses.
"""

from __future__ import annotations

import json as json_format
import math
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError, ProxyError

from afd_data.errors import UserError
from afd_data.provider_config import ProviderConfig
from afd_data.teachers import FailedError, LostError, UnknownError, UnreachableError
from afd_data.teachers.download import ExpiredError, NoVideoError, Tries, save
from afd_data.teachers.login import Login, checked_host
from afd_data.teachers.traffic import Rate, Turnstile, backoff_s, retry_after_s

CONNECT_S = 10.0
NO_ENTRY = {
    401: "the key is not valid",
    402: "the account has no credit left",
    403: "the key may not do this",
    404: "no such address or model",
}


class DeclinedError(UnreachableError):
    """The provider said no to what was sent: `status` (400 to 499) and `body`, its JSON ({} if it sent none)."""

    def __init__(self, status: int, body: dict, text: str) -> None:
        super().__init__(text)
        self.status, self.body = status, body


class Client:
    """One provider.  `scheme` precedes the key in the Authorization header.  Thread-safe.

    Raises UserError when the key's environment variable is not set, or `base_url` is not an address.
    """

    def __init__(
        self, config: ProviderConfig, scheme: str = "Bearer", headers: Mapping[str, str] | None = None
    ) -> None:
        self.host = checked_host(config.base_url, with_key=config.key_variable is not None)
        self._base = config.base_url.rstrip("/")
        self._login = Login(config.key_variable, scheme)
        self._headers = dict(headers or {})
        self._traffic = config.traffic
        self._rate = Rate(config.traffic.requests_per_minute)
        self._downloads = Turnstile(config.traffic.downloads)
        self._stop = threading.Event()

    def turn(self, stop: threading.Event) -> bool:
        """Wait until another order may be sent; False when told to stop.

        The pauses between the tries of an order heed this `stop` too; questions and downloads go on.
        """
        self._stop = stop
        return self._rate.wait(stop)

    def order(
        self,
        path: str,
        json: object | None = None,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict:
        """POST `json`, or `fields` as multipart, at once; return the JSON object that came back.  `turn` waits.

        Raises DeclinedError (4xx), FailedError (it certainly did not arrive), UnknownError, UserError.
        """
        files = None if fields is None else {name: (None, value) for name, value in fields.items()}
        said = ""
        for attempt in range(self._traffic.attempts):
            pause = backoff_s(attempt, self._traffic.longest_wait_s)
            try:
                answer = self._send("POST", path, json=json, files=files, headers=headers)
            except requests.RequestException as error:
                if not _never_sent(error):
                    raise UnknownError(f"no answer to the order: {self.clean(error)}") from None
                said = self.clean(error)
            else:
                if answer.status_code != 429:
                    return self._taken(answer)
                said, pause = self._words(answer), self._pause(answer, pause)
                self._rate.hold_off(pause)  # for all threads: the provider counts their orders together
            if attempt + 1 < self._traffic.attempts and (self._stop.wait(pause) or not self._rate.wait(self._stop)):
                raise FailedError(f"stopped before it was ordered: {said}")
        raise FailedError(f"not ordered after {self._traffic.attempts} tries: {said}")

    def ask(self, path: str, params: Mapping[str, str | int] | None = None) -> dict:
        """GET the JSON object at `path`.

        Raises LostError (404 or 410 in JSON), DeclinedError (other 4xx), UnreachableError (all tries), UserError.
        """
        said = ""
        for attempt in range(self._traffic.attempts):
            pause = backoff_s(attempt, self._traffic.longest_wait_s)
            try:
                answer = self._send("GET", path, params=params)
                if answer.status_code not in (408, 429) and answer.status_code < 500:
                    return self._told(answer, path)
                said, pause = self._words(answer), self._pause(answer, pause)
            except requests.RequestException as error:
                said = self.clean(error)
            if attempt + 1 < self._traffic.attempts:
                time.sleep(pause)
        raise UnreachableError(f"no answer after {self._traffic.attempts} tries: {said}")

    def download(self, address: Callable[[], str], target: Path, fetch_before: float = math.inf) -> None:
        """Stream a video to `target`; `address` gives its URL, or a path below the API, and is asked anew every time.

        Of all downloads that wait, the one that expires first gets the next place.  A file that is not whole is fetched
        again.  Raises LostError (expired at every try), RejectedError (it came whole every time, and is no video),
        UnreachableError, UserError (too large), and what `address` raises.
        """
        tries = Tries(self._traffic)
        with self._downloads.place(fetch_before):
            while True:
                url = address()
                try:
                    answer = self._stream(url, target)
                except ExpiredError as error:
                    pause = tries.expired(self.clean(error))
                except (requests.RequestException, UnreachableError) as error:
                    pause = tries.failed(self.clean(error), whole=isinstance(error, NoVideoError))
                else:
                    if answer.status_code == 200:
                        return
                    pause = self._pause(answer, tries.failed(f"{answer.status_code} {answer.reason}"))
                time.sleep(pause)

    def clean(self, text: object) -> str:
        """One short line of `text` without the key, and without the queries of signed addresses."""
        return self._login.clean(text)

    def no_entry(self, status: int, words: str) -> UserError:
        """What to tell a user whose orders are not taken; `status` is one of NO_ENTRY."""
        variable = self._login.variable
        key = f"The key is read from {variable}" if variable else "No key is sent: set teacher.key_variable"
        what = "Check teacher.base_url and the model's name" if status == 404 else key
        return UserError(f"{self.host}: {NO_ENTRY[status]}: {words}. {what}.")

    def _stream(self, url: str, target: Path) -> requests.Response:
        """The answer, closed; its body is in `target` where the status is 200."""
        try:
            own = not urlsplit(url).scheme
        except ValueError:
            raise requests.exceptions.InvalidURL(f"{url} is not an address") from None
        headers = {"Accept-Encoding": "identity", **(self._headers if own else {})}
        with requests.Session() as session:
            session.auth = self._login if own else Login(None)
            url = self._url(url) if own else url
            with session.get(url, headers=headers, stream=True, timeout=self._timeout) as answer:
                save(answer, target, self._traffic.max_video_mb)
                return answer

    def _send(self, method: str, path: str, headers: Mapping[str, str] | None = None, **what: Any) -> requests.Response:
        # A session a request: with a pooled connection that is half closed nobody can tell whether an order arrived.
        with requests.Session() as session:
            session.auth = self._login
            every = {**self._headers, **(headers or {})}
            return session.request(
                method, self._url(path), headers=every, timeout=self._timeout, allow_redirects=False, **what
            )

    def _taken(self, answer: requests.Response) -> dict:
        # 302, 303: see there what you have ordered.  409: this order, or its token, has been seen before.
        sent_on = 300 <= answer.status_code < 400 and answer.status_code not in (301, 307, 308)
        if sent_on or answer.status_code in (408, 409) or answer.status_code >= 500:
            raise UnknownError(f"the provider may have taken the order: {self._words(answer)}")
        self._check(answer)
        body = _json_object(answer)
        if body is None:
            raise UnknownError(f"the answer to the order is not a JSON object: {self._words(answer)}")
        return body

    def _told(self, answer: requests.Response, path: str) -> dict:
        body = _json_object(answer)
        if answer.status_code in (404, 410) and body is not None:
            raise LostError(f"the provider does not know {path}: {self._words(answer)}")
        if answer.status_code in NO_ENTRY:
            raise self.no_entry(answer.status_code, self._words(answer))
        self._check(answer)
        if body is None:
            raise UnreachableError(f"{path}: the answer is not a JSON object: {self._words(answer)}")
        return body

    def _check(self, answer: requests.Response) -> None:
        """Raises UserError or DeclinedError unless the answer is a success."""
        if answer.status_code >= 400:
            raise DeclinedError(answer.status_code, _json_object(answer) or {}, self._words(answer))
        if answer.status_code >= 300:
            raise UserError(f"{self.host}: leads elsewhere ({answer.status_code}). Set teacher.base_url to the API.")

    def _url(self, path: str) -> str:
        assert not urlsplit(path).scheme, "the key goes to the API only"
        return f"{self._base}/{path.lstrip('/')}"

    @property
    def _timeout(self) -> tuple[float, float]:
        return CONNECT_S, self._traffic.timeout_s

    def _pause(self, answer: requests.Response, otherwise: float) -> float:
        asked = retry_after_s(answer.headers.get("Retry-After"))
        return otherwise if asked is None else min(asked, self._traffic.longest_wait_s)

    def _words(self, answer: requests.Response) -> str:
        return f"{answer.status_code} {self.clean(answer.text)}".strip()


def _never_sent(error: requests.RequestException) -> bool:
    """Whether the request certainly did not leave this machine."""
    if isinstance(error, requests.ConnectTimeout):
        return True
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else cause
    if isinstance(reason, ProxyError):
        reason = reason.original_error
    if isinstance(reason, Exception) and reason.args and isinstance(reason.args[0], ssl.SSLCertVerificationError):
        return True
    return isinstance(reason, NewConnectionError | ConnectTimeoutError)


def _json_object(answer: requests.Response) -> dict | None:
    """What can be written down again: halves of characters become ?, numbers that are none become null."""
    try:
        text = json_format.dumps(answer.json(), ensure_ascii=False).encode(errors="replace")
        body = json_format.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None
