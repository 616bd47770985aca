"""The layout of a cluster: which worker holds which layers, and who serves together.

The planner writes a `Plan` as full desired state; workers and routers only read it. Pure data and
pure checks: nothing here does I/O.

    worker 0   [0 ........ 30)          group g0: one member, a whole replica
    worker 1   [0 ... 15)  ---+
    worker 2   [15 .. 30)  ---+         group g1: a pipeline of two stages, leader is worker 1
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from shared.wire import Message, WireModel


class Span(WireModel):
    """Half-open range of decoder layers `[start, end)`.

    The embedding belongs to the span that starts at 0, final norm and LM head to the one that ends
    at the model's last layer.
    """

    start: int = Field(ge=0)
    end: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Span:
        if self.end <= self.start:
            raise ValueError(f"span [{self.start}, {self.end}) is empty")
        return self

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


class MemberPlan(WireModel):
    """One stage of a group: a worker and the layers it shall serve."""

    worker_id: str
    span: Span


class GroupPlan(WireModel):
    """Workers that together hold one whole copy of the model; the first member is the leader."""

    group_id: str
    members: tuple[MemberPlan, ...] = Field(min_length=1)

    @property
    def leader(self) -> str:
        """The worker of stage 0, which runs the group's scheduler."""
        return self.members[0].worker_id

    def tiles(self, num_layers: int) -> bool:
        """True if the members' spans, in order, cover `[0, num_layers)` exactly once."""
        position = 0
        for member in self.members:
            if member.span.start != position:
                return False
            position = member.span.end
        return position == num_layers


class LayoutState(StrEnum):
    """What the cluster is doing, as `GET /cluster` shows it."""

    STABLE = "stable"
    DROPPING = "dropping"
    DROPPED = "dropped"
    RESTORING = "restoring"


class PlanPhase(StrEnum):
    """Two-phase application: nobody drops a layer before the peer that keeps it is prepared."""

    PREPARE = "prepare"
    COMMIT = "commit"


class Plan(Message):
    """The full desired layout. `(term, epoch)` is compared lexicographically and only rises."""

    term: int
    epoch: int
    state: LayoutState
    phase: PlanPhase = PlanPhase.COMMIT
    model_id: str
    num_layers: int
    groups: tuple[GroupPlan, ...]
    reason: str = ""
    created_at: float
    deadline_at: float | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _check(self) -> Plan:
        seen: set[str] = set()
        for group in self.groups:
            if not group.tiles(self.num_layers):
                raise ValueError(
                    f"group {group.group_id} does not hold every layer of [0, {self.num_layers})"
                    " exactly once"
                )
            for member in group.members:
                if member.worker_id in seen:
                    raise ValueError(f"worker {member.worker_id} is in two groups")
                seen.add(member.worker_id)
        return self

    @property
    def version(self) -> tuple[int, int]:
        """The fencing token: a plan with a lower one is stale."""
        return (self.term, self.epoch)

    def group_of(self, worker_id: str) -> GroupPlan | None:
        """The group that `worker_id` belongs to, or None."""
        for group in self.groups:
            if any(member.worker_id == worker_id for member in group.members):
                return group
        return None


class Transition(WireModel):
    """One past change of the layout, as `GET /cluster` lists it."""

    term: int
    epoch: int
    state: LayoutState
    cause: str
    started_at: float
    phase_seconds: dict[str, float] = Field(default_factory=dict)
    result: str = "applied"


class TransitionLog(Message):
    """The last transitions, oldest first; kept in the plan bucket by the leading planner."""

    transitions: tuple[Transition, ...] = ()
