"""Server-sent events: `data: {json}` and a blank line, at the end `data: [DONE]`.

No comments and no heartbeats, because load generators parse every line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

#: A text as a JSON string. The standard library's C function, without an encoder's overhead.
encode_text = json.encoder.encode_basestring


def encode_json(value: object) -> str:
    """Compact JSON."""
    return _ENCODER.encode(value)


def event(value: Mapping[str, object]) -> bytes:
    """One event."""
    return f"data: {_ENCODER.encode(value)}\n\n".encode()


async def open_stream(request: web.Request) -> web.StreamResponse:
    """Begin the response; its headers go out with the first event."""
    response = web.StreamResponse(headers=_HEADERS)
    await response.prepare(request)
    return response
