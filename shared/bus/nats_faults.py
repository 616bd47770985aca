"""nats-py's errors and log records in our terms."""

from __future__ import annotations

import logging

import nats.errors
import structlog

from shared.bus.base import (
    BusDisconnectedError,
    BusError,
    BusTimeoutError,
    NoRespondersError,
    PayloadTooLargeError,
)


def translate(error: nats.errors.Error, subject: str, payload_bytes: int = 0) -> BusError:
    """The BusError for an error of nats-py (JetStream's own are not for here)."""
    match error:
        case nats.errors.NoRespondersError():
            return NoRespondersError(f"nobody listens on {subject}")
        case nats.errors.TimeoutError():
            return BusTimeoutError(f"no answer on {subject} in time")
        case nats.errors.MaxPayloadError():
            return PayloadTooLargeError(f"message to {subject} has {payload_bytes} bytes")
        case nats.errors.OutboundBufferLimitError():
            return BusDisconnectedError("disconnected from NATS and the send buffer is full")
        case nats.errors.ConnectionClosedError() | nats.errors.ConnectionDrainingError():
            return BusDisconnectedError("the connection to NATS is closed")
        case nats.errors.BadSubjectError():
            return BusError(f"{subject!r} is no subject")
        case _:
            return BusError(str(error))


class _ClientLogHandler(logging.Handler):
    """Turns nats-py's log records, tracebacks included, into one structured line each."""

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        structlog.get_logger(component="bus").warning(
            "bus.client_log", message=record.getMessage(), error=repr(cause) if cause else ""
        )


def forward_client_log() -> None:
    """Send what nats-py logs to structlog. Idempotent."""
    logger = logging.getLogger("nats")
    if not any(isinstance(handler, _ClientLogHandler) for handler in logger.handlers):
        logger.addHandler(_ClientLogHandler())
        logger.propagate = False
