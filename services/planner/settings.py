"""Settings of one planner process."""

from __future__ import annotations

import secrets
from enum import StrEnum

from pydantic import Field, field_validator

from services.planner.inputs import Timing
from shared.service_settings import ServiceSettings
from shared.subjects import validate_name


class Policy(StrEnum):
    """What happens when KV memory runs short."""

    DROP = "drop"
    NONE = "none"


def default_planner_id() -> str:
    """A fresh name: several planners may run, one of them leads."""
    return f"planner-{secrets.token_hex(4)}"


class PlannerSettings(ServiceSettings):
    """One planner of a cluster."""

    planner_id: str = Field(
        default_factory=default_planner_id, description="unique name (default: random)"
    )
    load_stale_seconds: float = Field(
        default=2.0, gt=0.0, description="a load report older than this says nothing"
    )
    policy: Policy = Field(
        default=Policy.DROP, description="drop: free copies of layers under pressure; none: do not"
    )
    min_dwell_seconds: float = Field(
        default=10.0, ge=0.0, description="shortest time between two transitions"
    )
    ack_timeout_seconds: float = Field(
        default=10.0, gt=0.0, description="time workers have to prepare a drop, to apply a plan"
    )
    restore_timeout_seconds: float = Field(
        default=120.0, gt=0.0, description="time workers have to load layers again"
    )
    settle_timeout_seconds: float = Field(
        default=120.0, gt=0.0, description="time the exchange of KV may take"
    )
    admin_host: str = Field(default="127.0.0.1", description="address of /live, /ready, /metrics")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of the admin endpoints, 0 for any (default: none)",
    )

    @property
    def timing(self) -> Timing:
        """The deadlines of a transition."""
        return Timing(
            prepare_seconds=self.ack_timeout_seconds,
            restore_seconds=self.restore_timeout_seconds,
            commit_seconds=self.ack_timeout_seconds,
            settle_seconds=self.settle_timeout_seconds,
        )

    @field_validator("planner_id")
    @classmethod
    def _check_planner_id(cls, value: str) -> str:
        return validate_name(value, "planner id")
