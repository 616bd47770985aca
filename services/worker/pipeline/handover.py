"""Requests that change their scheduler: as the engine has them, and as they travel."""

from __future__ import annotations

from collections.abc import Sequence

from services.worker.engine.request import Request, RequestStatus
from services.worker.engine.routes import Route
from services.worker.pipeline.messages import RequestMessage
from shared.messages import TokenItem, pack_token_ids, unpack_token_ids


def pack_request(request: Request, items: Sequence[TokenItem] | None, now: float) -> RequestMessage:
    """A request as `Relocation.hand_over` left it, and what its router was told of it.

    Args:
        items: None if nobody wants it any more.
        now: on the clock of `Request.arrival_seconds`.
    """
    route = request.route
    return RequestMessage(
        request_id=request.request_id,
        router_id=request.router_id,
        attempt=request.attempt,
        prompt_token_ids=pack_token_ids(request.prompt_token_ids),
        output_token_ids=pack_token_ids(request.output_token_ids),
        sampling=request.sampling,
        eos_token_ids=tuple(request.eos_token_ids),
        num_computed_tokens=request.num_computed_tokens,
        num_preemptions=request.num_preemptions,
        age_seconds=now - request.arrival_seconds,
        queued_seconds=request.queued_seconds,
        origin_id=route.route_id if route else "",
        origin=route.stages if route else (),
        is_wanted=items is not None,
        items=tuple(items or ()),
    )


def unpack_request(message: RequestMessage, now: float) -> Request:
    """The request for `Relocation.adopt`."""
    arrival = now - message.age_seconds
    queued = message.queued_seconds
    if message.origin:
        status = RequestStatus.PARKED
    else:
        status = RequestStatus.PREEMPTED if message.num_preemptions else RequestStatus.WAITING
    return Request(
        request_id=message.request_id,
        router_id=message.router_id,
        attempt=message.attempt,
        prompt_token_ids=unpack_token_ids(message.prompt_token_ids),
        output_token_ids=unpack_token_ids(message.output_token_ids),
        sampling=message.sampling,
        eos_token_ids=frozenset(message.eos_token_ids),
        num_computed_tokens=message.num_computed_tokens,
        num_preemptions=message.num_preemptions,
        arrival_seconds=arrival,
        first_scheduled_seconds=None if queued is None else arrival + queued,
        status=status,
        route=Route(message.origin_id, message.origin) if message.origin else None,
    )
