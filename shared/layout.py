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
    """One stage of a group: a worker and the layers it shall serve.

    `incarnation` is the process that a pipeline was formed with: another one under the same name
    knows nothing of it, so the group is broken. Empty in a replica, which anybody whole may be.
    """

    worker_id: str
    span: Span
    incarnation: str = ""


class GroupPlan(WireModel):
    """Workers that together hold one whole copy of the model; the first member is the leader.

    `epoch` is the epoch of the plan that first proposed a pipeline; it stays while the group stays,
    although the plan's own epoch rises, so frames between members carry (group_id, this epoch). A
    replica, which has no links, has 0.
    """

    group_id: str
    members: tuple[MemberPlan, ...] = Field(min_length=1)
    epoch: int = 0

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


class HoldKind(StrEnum):
    """What the planner may not do by itself while an operator's order holds."""

    NO_RESTORE = "no_restore"
    NO_DROP = "no_drop"


class Hold(WireModel):
    """An operator's order that stays in force after it was carried out."""

    kind: HoldKind
    until: float | None = Field(default=None, description="wall clock; None: until the opposite")

    def forbids(self, kind: HoldKind, now: float) -> bool:
        """True while `kind` is out of the question; `now` is wall clock."""
        return self.kind is kind and (self.until is None or now < self.until)


class Change(WireModel):
    """A transition that is under way: what it started from, and what it took so far.

    `previous_groups` serve until COMMIT, and again when PREPARE fails.
    """

    cause: str
    started_at: float
    previous_groups: tuple[GroupPlan, ...]
    previous_hold: Hold | None = None
    phase_seconds: dict[str, float] = Field(default_factory=dict)


class Plan(Message):
    """The full desired layout. `(term, epoch)` is compared lexicographically and only rises.

    Everything a new leader needs to go on with a transition is here: `change` is set from PREPARE
    until the members are settled. Times are wall clock.
    """

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
    change: Change | None = None
    hold: Hold | None = None
    settled_at: float = Field(default=0.0, description="when the last transition ended")
    not_before: float = Field(default=0.0, description="earliest next transition of its own accord")

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

    @property
    def serving_groups(self) -> tuple[GroupPlan, ...]:
        """The groups that take requests now: while a transition is prepared, the previous ones."""
        if self.phase is PlanPhase.PREPARE and self.change is not None:
            return self.change.previous_groups
        return self.groups

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


class DecisionNote(WireModel):
    """The planner's latest news, for `GET /cluster`: what it does now, by which rule, and why."""

    action: str
    rule: str
    detail: str = ""
    figures: dict[str, float] = Field(default_factory=dict)
    decided_at: float


class TransitionLog(Message):
    """The last transitions, oldest first; kept in the plan bucket by the leading planner."""

    transitions: tuple[Transition, ...] = ()
    decision: DecisionNote | None = None
