"""Every NATS subject and key-value bucket of a deployment, in one place.

A deployment name keeps several clusters on one NATS server apart. Subjects put the namespace first
and the identifier last, so that receivers subscribe once with a wildcard and never per request.

    ks.<deployment>.w.<worker>.gen     router -> worker    request/reply: GenerateRequest
    ks.<deployment>.w.<worker>.ctl     router/planner -> worker    Cancel, Resume, Drain, Ping
    ks.<deployment>.w.<worker>.link    worker -> worker    request/reply: LinkOffer
    ks.<deployment>.tok.<router>       worker -> router    TokenFrame, one per engine step
    ks.<deployment>.load.<worker>      worker -> all       LoadReport
    ks.<deployment>.queue.<router>     router -> planners   QueueReport
    ks.<deployment>.planner.admin      router -> leading planner    request/reply: AdminRequest

    KV ks_<deployment>_members         leases of workers, planners and routers (TTL)
    KV ks_<deployment>_plan            the plan and the list of past transitions (history)
    KV ks_<deployment>_acks            what each worker did with the plan
    KV ks_<deployment>_leader          the lease of the leading planner (TTL)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

PLAN_KEY = "plan"
TRANSITIONS_KEY = "transitions"
LEADER_KEY = "planner"


def validate_name(name: str, what: str) -> str:
    """Return `name` if it can be one token of a subject, else raise ConfigError naming `what`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} {name!r} must be 1 to 64 letters, digits, '-' or '_' (it becomes part of"
            " NATS subjects)"
        )
    return name


@dataclass(frozen=True)
class Subjects:
    """Subjects and buckets of one deployment."""

    deployment: str

    def __post_init__(self) -> None:
        validate_name(self.deployment, "deployment")

    def generate(self, worker_id: str) -> str:
        return f"ks.{self.deployment}.w.{worker_id}.gen"

    def control(self, worker_id: str) -> str:
        return f"ks.{self.deployment}.w.{worker_id}.ctl"

    def link(self, worker_id: str) -> str:
        return f"ks.{self.deployment}.w.{worker_id}.link"

    def tokens(self, router_id: str) -> str:
        return f"ks.{self.deployment}.tok.{router_id}"

    def load(self, worker_id: str) -> str:
        return f"ks.{self.deployment}.load.{worker_id}"

    @property
    def all_loads(self) -> str:
        return f"ks.{self.deployment}.load.*"

    def queue(self, router_id: str) -> str:
        return f"ks.{self.deployment}.queue.{router_id}"

    @property
    def all_queues(self) -> str:
        return f"ks.{self.deployment}.queue.*"

    @property
    def admin(self) -> str:
        return f"ks.{self.deployment}.planner.admin"

    @property
    def members_bucket(self) -> str:
        return f"ks_{self.deployment}_members"

    @property
    def plan_bucket(self) -> str:
        return f"ks_{self.deployment}_plan"

    @property
    def acks_bucket(self) -> str:
        return f"ks_{self.deployment}_acks"

    @property
    def leader_bucket(self) -> str:
        return f"ks_{self.deployment}_leader"


def worker_key(worker_id: str) -> str:
    """Key of a worker's lease in the members bucket."""
    return f"worker.{worker_id}"


def planner_key(planner_id: str) -> str:
    """Key of a planner's lease in the members bucket."""
    return f"planner.{planner_id}"


def router_key(router_id: str) -> str:
    """Key of a router's lease in the members bucket."""
    return f"router.{router_id}"
