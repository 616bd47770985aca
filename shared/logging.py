"""Structured logs on standard error: one JSON object a line, or text for a terminal.

Every line has `ts` (UTC, RFC 3339), `level`, `event`, `service` and `instance`; request
handlers bind `request_id`. Prompts and tokens are never logged. What libraries log through the
standard library comes out in the same form.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


def configure_logging(
    service: str, instance: str, log_format: LogFormat, log_level: str
) -> structlog.stdlib.BoundLogger:
    """Set up structlog for this process and return its root logger."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format is LogFormat.JSON
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    level = logging.getLevelNamesMapping()[log_level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_LibraryLogHandler()], level=max(level, logging.WARNING))
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(service=service, instance=instance)
    return logger


#: The fault of whoever sent the bytes: one line says all, where a traceback would say nothing more.
_FAULTS_OF_CLIENTS = (HttpProcessingError, RequestPayloadError)


class _LibraryLogHandler(logging.Handler):
    """Turns the records of libraries into lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(component=record.name)
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, _FAULTS_OF_CLIENTS):
            log.warning("http.unreadable_request", error=" ".join(str(error).split()))
        else:
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)
