"""Structured logs on standard error: one JSON object a line, or text for a terminal.

Every line has `ts` (UTC, RFC 3339), `level`, `event`, `service` and `instance`; request
handlers bind `request_id`. Prompts and tokens are never logged.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog


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
    logging.basicConfig(stream=sys.stderr, level=max(level, logging.WARNING))
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(service=service, instance=instance)
    return logger
