"""What the router says to workers, and what their silence means.

The one place that turns a worker's answer, or the lack of one, into an outcome.
"""

from __future__ import annotations

from enum import Enum

import structlog

from services.router.session import Session
from shared.bus.base import (
    Bus,
    BusDisconnectedError,
    BusError,
    NoRespondersError,
)
from shared.messages import (
    Cancel,
    GenerateReply,
    GenerateRequest,
    Ping,
    Resume,
    ResumeReply,
    pack_token_ids,
)
from shared.subjects import Subjects
from shared.wire import MessageError

PING_TIMEOUT_SECONDS = 0.5
RESUME_TIMEOUT_SECONDS = 2.0


class Reach(Enum):
    """What became of an attempt to talk to a worker."""

    YES = "yes"
    UNKNOWN = "unknown"  # it answered that it does not know the request
    SILENT = "silent"  # no answer in time, or none that could be read
    GONE = "gone"  # nobody listens there
    DISCONNECTED = "disconnected"  # this router has no connection to the bus


class WorkerLink:
    """Messages to workers."""

    def __init__(
        self, bus: Bus, subjects: Subjects, router_id: str, dispatch_timeout_seconds: float
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._router_id = router_id
        self._dispatch_timeout_seconds = dispatch_timeout_seconds
        self._log = structlog.get_logger(component="link")

    async def generate(
        self, session: Session, group_id: str, epoch: int, dispatch_number: int
    ) -> GenerateReply:
        """Send a request to its worker; raises a BusError or a MessageError."""
        request = GenerateRequest(
            request_id=session.request.request_id,
            router_id=self._router_id,
            attempt=session.stream.attempt,
            group_id=group_id,
            epoch=epoch,
            dispatch_number=dispatch_number,
            prompt_token_ids=session.request.packed_prompt(),
            output_token_ids=pack_token_ids(session.stream.output_token_ids),
            sampling=session.request.sampling,
            eos_token_ids=session.request.eos_token_ids,
            traceparent=session.request.traceparent,
        )
        answer = await self._bus.request(
            self._subjects.generate(session.worker_id),
            request.encode(),
            timeout_seconds=self._dispatch_timeout_seconds,
        )
        return GenerateReply.decode(answer)

    async def resume(self, session: Session) -> Reach:
        """Ask for the tokens after those received."""
        message = Resume(
            request_id=session.request.request_id,
            attempt=session.stream.attempt,
            num_received=len(session.stream.output_token_ids),
        )
        subject = self._subjects.control(session.worker_id)
        try:
            answer = await self._bus.request(
                subject, message.encode(), timeout_seconds=RESUME_TIMEOUT_SECONDS
            )
            return Reach.YES if ResumeReply.decode(answer).known else Reach.UNKNOWN
        except MessageError as error:
            self._log.warning("resume.malformed_reply", worker=session.worker_id, error=str(error))
            return Reach.UNKNOWN
        except BusError as error:
            return _meaning(error)

    async def ping(self, worker_id: str) -> Reach:
        """Ask whether the worker is there."""
        try:
            await self._bus.request(
                self._subjects.control(worker_id),
                Ping().encode(),
                timeout_seconds=PING_TIMEOUT_SECONDS,
            )
        except BusError as error:
            return _meaning(error)
        return Reach.YES

    async def cancel(self, worker_id: str, request_id: str, attempt: int) -> None:
        """Tell a worker that nobody wants the tokens any more.

        May get lost; the token inbox has it sent again while tokens keep coming.
        """
        message = Cancel(request_id=request_id, attempt=attempt)
        try:
            await self._bus.publish(self._subjects.control(worker_id), message.encode())
        except BusError as error:
            self._log.debug("cancel.lost", worker=worker_id, error=str(error))


def _meaning(error: BusError) -> Reach:
    match error:
        case NoRespondersError():
            return Reach.GONE
        case BusDisconnectedError():
            return Reach.DISCONNECTED
        case _:
            return Reach.SILENT
