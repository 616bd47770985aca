"""The settings that router, planner and worker have in common."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from shared.logging import LogFormat
from shared.settings import Settings


class ServiceSettings(Settings):
    """How a service finds its cluster, and how it logs."""

    deployment: str = Field(default="default", description="name of the cluster on the NATS server")
    nats: str = Field(default="nats://127.0.0.1:4222", description="URL of the NATS server")
    nats_creds: Path | None = Field(default=None, description="NATS credentials file")
    nats_nkey: Path | None = Field(default=None, description="file with a NATS nkey seed")
    lease_ttl_seconds: float = Field(
        default=6.0, ge=2.0, description="a process silent for so long is gone; the same everywhere"
    )
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text or json")
    log_level: str = Field(default="info", description="debug, info, warning or error")

    @field_validator("log_level")
    @classmethod
    def _check_log_level(cls, value: str) -> str:
        if value.lower() not in {"debug", "info", "warning", "error"}:
            raise ValueError(f"{value!r} is none of debug, info, warning, error")
        return value.lower()
