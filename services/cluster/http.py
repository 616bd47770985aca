"""Plain HTTP questions to a service, for commands that ask one thing and end."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from shared.errors import ConfigError, KunserveError


class UnreachableError(KunserveError):
    """Nobody answers at the URL."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status, and its body where that is JSON."""

    status: int
    body: Any

    @property
    def problem(self) -> str:
        """What the service says is wrong, in its own words where it has any."""
        match self.body:
            case {"error": {"message": str(message)}}:
                return message
            case {"reasons": list(reasons)} if reasons:
                return "; ".join(map(str, reasons))
        return f"HTTP status {self.status}"


def ask(
    url: str, *, timeout_seconds: float, bearer: str | None = None, body: object = None
) -> Answer:
    """GET the URL, or POST `body` to it as JSON. Never follows the proxy settings.

    Raises ConfigError where the URL is none, UnreachableError where nothing answers in time.
    """
    headers = {"Accept": "application/json"}
    data = None
    if bearer:
        headers["Authorization"] = f"Bearer {bearer}"
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no URL; write for example http://127.0.0.1:8000")
    request = urllib.request.Request(url, data=data, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_seconds) as response:
            return Answer(response.status, _json(response.read()))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, _json(error.read()))
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(f"no answer from {url}: {reason}") from error


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
