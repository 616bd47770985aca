"""`kunserve health SERVICE`: one answer as an exit code, for container health checks."""

from __future__ import annotations

import argparse

from pydantic import Field

from services.cluster.http import ask
from services.cluster.program import Program
from shared.errors import ConfigError, KunserveError
from shared.settings import Settings


class HealthSettings(Settings):
    """Where the service is. In its own container its own settings say it."""

    url: str | None = Field(default=None, description="URL of the service (default: this machine)")
    port: int = Field(default=8000, ge=1, le=65535, description="port of a router on this machine")
    admin_port: int | None = Field(
        default=None, ge=1, le=65535, description="admin port of a planner or worker here"
    )
    timeout_seconds: float = Field(default=3.0, gt=0.0, description="longest wait for an answer")


def health_url(service: str, settings: HealthSettings) -> str:
    """The question to ask; raises ConfigError where nothing says where the service is."""
    path = "/health" if service == "router" else "/ready"
    if settings.url is not None:
        return settings.url.rstrip("/") + path
    port = settings.port if service == "router" else settings.admin_port
    if port is None:
        raise ConfigError(f"give --url or --admin-port: nothing says where the {service} is")
    return f"http://127.0.0.1:{port}{path}"


def _add_positionals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", choices=("router", "planner", "worker"))


def _run(settings: HealthSettings, arguments: argparse.Namespace) -> int:
    url = health_url(arguments.service, settings)
    answer = ask(url, timeout_seconds=settings.timeout_seconds)
    if answer.status != 200:
        raise KunserveError(f"the {arguments.service} at {url} is not healthy: {answer.problem}")
    return 0


HEALTH = Program(
    HealthSettings,
    _run,
    "kunserve health router\n"
    "  kunserve health router --url http://127.0.0.1:8000\n"
    "  kunserve health worker --url http://127.0.0.1:9100",
    usage="SERVICE [OPTIONS]",
    add_positionals=_add_positionals,
)
