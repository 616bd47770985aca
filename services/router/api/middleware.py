"""Around every handler: request id, keys, errors in one shape, counting, one log line."""

from __future__ import annotations

import asyncio
import hmac
import time

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from services.router.api.start import REQUEST_ID, new_request_id, request_id_of
from services.router.errors import (
    ApiError,
    BodyTooLargeError,
    MethodNotAllowedError,
    NotFoundError,
    UnauthorizedError,
)
from services.router.metrics import RouterMetrics

#: What is counted where the client has gone before its answer was complete (nginx's code).
CLIENT_CLOSED_REQUEST = 499
_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def error_response(error: ApiError) -> web.Response:
    """An error as a response."""
    return web.json_response(error.body(), status=error.status, headers=error.headers)


def frame_requests(metrics: RouterMetrics) -> Middleware:
    """The outermost middleware: nothing but answers in OpenAI's shape leaves the router."""
    log = structlog.get_logger(component="api")

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        started_at = time.monotonic()
        request_id = new_request_id(request)
        request[REQUEST_ID] = request_id
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            route = request.match_info.route.resource
            path = route.canonical if route is not None else "unknown"
            try:
                response = await _answer(request, handler, log)
            except asyncio.CancelledError:  # so aiohttp ends the handler of a client that has gone
                metrics.count_request(path, CLIENT_CLOSED_REQUEST)
                raise
            metrics.count_request(path, response.status)
            log.debug(
                "request",
                method=request.method,
                path=path,
                status=response.status,
                seconds=round(time.monotonic() - started_at, 4),
            )
        return response

    return middleware


async def _answer(
    request: web.Request, handler: Handler, log: structlog.stdlib.BoundLogger
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error_response(error)
    except web.HTTPNotFound:
        return error_response(NotFoundError(f"there is no {request.path}"))
    except web.HTTPMethodNotAllowed as error:
        message = f"{request.path} does not take {request.method}"
        return error_response(
            MethodNotAllowedError(message, allowed=frozenset(error.allowed_methods))
        )
    except web.HTTPRequestEntityTooLarge as error:
        return error_response(BodyTooLargeError(f"the request body is too large: {error.text}"))
    except web.HTTPException:
        raise
    except ConnectionError:
        return web.Response(status=CLIENT_CLOSED_REQUEST)
    except Exception:
        log.exception("request.failed", path=request.path)
        return error_response(
            ApiError(f"the router failed to serve request {request_id_of(request)}")
        )


def require_keys(api_key: str | None, admin_key: str | None) -> Middleware:
    """Ask for a bearer token where one is configured; health and metrics stay open."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/admin/"):
            _check_key(request, admin_key)
        elif request.path.startswith(_GUARDED):
            _check_key(request, api_key)
        return await handler(request)

    return middleware


def _check_key(request: web.Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), key.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise UnauthorizedError("a valid API key is needed: Authorization: Bearer KEY")


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: give every response, streams included, the request's id."""
    if REQUEST_ID in request:  # aiohttp itself answers an `Expect` that it does not know
        response.headers["X-Request-Id"] = request_id_of(request)
