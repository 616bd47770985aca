"""Requests that come from another worker's scheduler, as its `HandOver` brings them."""

from __future__ import annotations

import structlog

from services.worker.engine.relocation import RelocationError
from services.worker.engine.routes import Route
from services.worker.engine.scheduler import Scheduler
from services.worker.pipeline.events import Adopted, EventSink
from services.worker.pipeline.handover import unpack_request
from services.worker.pipeline.messages import HandOver, RequestMessage


def adopt_all(
    scheduler: Scheduler, message: HandOver, target: Route, emit: EventSink, now: float
) -> list[RequestMessage]:
    """Take over requests, which go on along `target`; those nobody wants are ended at once.

    Returns:
        Requests that cannot be taken: they are here already.
    """
    log = structlog.get_logger(component="adoption", worker=message.worker_id)
    adopted, refused = [], []
    for each in message.requests:
        try:
            scheduler.relocation.adopt(unpack_request(each, now), target)
        except RelocationError as error:
            log.error("request not taken over", reason=str(error))
            refused.append(each)
            continue
        if each.is_wanted:
            adopted.append(each)
        else:
            scheduler.cancel(each.request_id, each.attempt)
    emit(Adopted(tuple(adopted)))
    log.info("requests taken over", requests=len(adopted))
    return refused
