"""Settings of `kunserve up`: its own, and every setting of the services that it passes on.

An option of a service is declared once, by that service. `up` takes all of them except those that
differ from child to child, and hands each child what was set through its environment (a command
line would show secrets to every user of the machine). What `up` itself reads is declared here too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from services.planner.settings import PlannerSettings
from services.router.settings import RouterSettings
from services.worker.settings import WorkerSettings
from shared.logging import LogFormat
from shared.settings import ENV_PREFIX, Settings

SERVICES: dict[str, type[Settings]] = {
    "worker": WorkerSettings,
    "router": RouterSettings,
    "planner": PlannerSettings,
}
_SET_BY_UP = frozenset({"planner_id", "router_id", "worker_id", "admin_host", "admin_port"})


class LocalClusterSettings(Settings):
    """A whole cluster on this machine: NATS, planner, router, workers."""

    model: str = Field(
        default="builtin:smollm2",
        description="builtin:smollm2, a Hugging Face safetensors directory, or a GGUF file",
    )
    workers: int = Field(default=2, ge=1, le=256, description="number of workers")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on, 0 for any free")
    nats: str | None = Field(
        default=None, description="URL of a running NATS server (default: start a private one)"
    )
    nats_creds: Path | None = Field(default=None, description="NATS credentials file")
    nats_nkey: Path | None = Field(default=None, description="file with a NATS nkey seed")
    cache_dir: Path | None = Field(default=None, description="where converted models are kept")
    api_key: str | None = Field(default=None, description="bearer token that /v1 asks for")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="compute threads of each worker (default: a share)"
    )
    startup_timeout_seconds: float = Field(
        default=300.0, gt=0.0, description="time until the first request must be possible"
    )
    drain_timeout_seconds: float = Field(
        default=30.0, ge=0.0, description="time running requests get at shutdown"
    )
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text or json")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error"
    )


def _up_settings() -> type[LocalClusterSettings]:
    """`LocalClusterSettings` with the fields that services have and it does not."""
    passed_on: dict[str, Any] = {}
    for service in SERVICES.values():
        for name, field in service.model_fields.items():
            if name not in _SET_BY_UP and name not in LocalClusterSettings.model_fields:
                passed_on.setdefault(name, (field.annotation, field))
    settings: type[LocalClusterSettings] = create_model(
        "UpSettings", __base__=LocalClusterSettings, **passed_on
    )
    return settings


#: What `kunserve up` is configured by.
UpSettings = _up_settings()


def child_environment(
    service: str,
    settings: LocalClusterSettings,
    overrides: Mapping[str, object],
    environment: Mapping[str, str],
) -> dict[str, str]:
    """The environment of one child.

    It holds no setting but those of `settings` that were given and that the service knows, and
    `overrides`, which win.
    """
    known = SERVICES[service].model_fields
    values = settings.model_dump(mode="json", include=settings.model_fields_set & known.keys())
    values |= overrides
    own = {
        variable + suffix
        for variable in (ENV_PREFIX + name.upper() for name in _all_fields())
        for suffix in ("", "_FILE")
    }
    inherited = {name: value for name, value in environment.items() if name not in own}
    given = {
        ENV_PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None
    }
    return inherited | given | {"PYTHONPATH": _python_path(environment)}


def _python_path(environment: Mapping[str, str]) -> str:
    """This installation first: a child must not run what lies in the user's directory."""
    installation = str(Path(__file__).parents[2])
    inherited = environment.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, (installation, inherited)))


def threads_per_worker(settings: LocalClusterSettings) -> int:
    """What was asked for, or an equal share of the cores this process may use."""
    if settings.threads is not None:
        return settings.threads
    return max(1, len(os.sched_getaffinity(0)) // settings.workers)


def _all_fields() -> set[str]:
    names = set(UpSettings.model_fields)
    for service in SERVICES.values():
        names |= set(service.model_fields)
    return names
