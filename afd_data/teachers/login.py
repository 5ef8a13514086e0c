"""The key of a provider: out of an environment variable, into one header, and out of every text that is shown."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import quote, urlsplit

import requests
from requests.auth import AuthBase

from afd_data.errors import UserError

READ = 10_000  # characters of a text that are looked at
SHOWN = 300  # characters of it that are shown
PRIVATE = ("localhost", ".localhost", ".local", ".internal", ".lan", ".home.arpa")  # ends of names
_QUERY = re.compile(r"[?#][^\s'\"<>=]*=[^\s'\"<>]*")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Login(AuthBase):
    """Sets the Authorization header to SCHEME KEY; with no key none, and no login of ~/.netrc either.

    Raises UserError naming the environment variable, never what it holds, when it is not set or cannot be a key.
    """

    def __init__(self, variable: str | None, scheme: str = "Bearer") -> None:
        self.variable = variable
        self._scheme = scheme
        self._key = "" if variable is None else _key(variable)

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """What `requests` calls just before it sends."""
        if self._key:
            request.headers["Authorization"] = f"{self._scheme} {self._key}"
        return request

    def clean(self, text: object) -> str:
        """One short line of `text` without the key, and without the queries of signed addresses."""
        line = " ".join(str(text)[:READ].encode(errors="replace").decode().split())  # half a character becomes ?
        for form in {self._key, quote(self._key, safe=""), self._key.replace("/", "\\/")} - {""}:
            line = line.replace(form, "***")
        return _LOGIN.sub("", _QUERY.sub("", line))[:SHOWN]


def checked_host(base_url: str, with_key: bool) -> str:
    """HOST[:PORT] of the API.

    Raises UserError when the address is not one, holds a login, or would send the key through the open in plain text.
    """
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        raise UserError("teacher.base_url: not an http:// or https:// address") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("teacher.base_url: no login, no ? and no # in it. A key goes into an environment variable.")
    if not usable:
        raise UserError(f"teacher.base_url: {base_url!r} is not an http:// or https:// address")
    if with_key and parts.scheme == "http" and not _is_private(parts.hostname or ""):
        raise UserError(f"teacher.base_url: the key would go to {parts.hostname} in plain text. Write https://.")
    return parts.netloc


def _is_private(host: str) -> bool:
    """Whether a host is this machine or one of the network around it: by its number, or a name that only these have."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.lower().endswith(PRIVATE)


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"teacher.key_variable: the environment variable {variable} is not set. Put the key there.")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"teacher.key_variable: what {variable} holds cannot be a key (line breaks, or not ASCII)")
    return key
