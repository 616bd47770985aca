"""All that a decision depends on. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.planner.pressure import GroupLoad, Pressure, Thresholds
from shared.layout import LayoutState, Plan
from shared.messages import AdminRequest, PlanAck, WorkerInfo


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of the phases, seconds."""

    prepare_seconds: float = 10.0
    restore_seconds: float = 120.0
    commit_seconds: float = 10.0
    settle_seconds: float = 120.0

    def prepare_deadline(self, state: LayoutState, now: float) -> float:
        """When PREPARE must be answered: a restore loads weights first."""
        is_restore = state is LayoutState.RESTORING
        return now + (self.restore_seconds if is_restore else self.prepare_seconds)


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a decision depends on.

    Attributes:
        stored: the plan in the store now; None where there is none (any more).
        remembered: the newest plan this planner has seen or written.
        applied: the highest term and the highest epoch that any worker says it applied.
        acks: the latest acknowledgement of each worker.
        applied_at: when each worker was first heard to have applied what its ack is about.
        membership_held: absence of a worker proves nothing at the moment.
        pressure: None where load is not looked at.
        loads: load of each group whose report is fresh, by group id.
        wish: a drop or a restore that an operator asks for now.
        may_drop: the policy lets the planner drop by itself.
        now: wall clock, seconds.
    """

    term: int
    workers: Mapping[str, WorkerInfo]
    stored: Plan | None = None
    remembered: Plan | None = None
    applied: tuple[int, int] = (0, 0)
    acks: Mapping[str, PlanAck] = field(default_factory=dict)
    applied_at: Mapping[str, float] = field(default_factory=dict)
    membership_held: bool = False
    pressure: Pressure | None = None
    loads: Mapping[str, GroupLoad] = field(default_factory=dict)
    wish: AdminRequest | None = None
    may_drop: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)
    timing: Timing = field(default_factory=Timing)
    now: float = 0.0

    @property
    def previous(self) -> Plan | None:
        """The newest plan known."""
        known = [plan for plan in (self.stored, self.remembered) if plan is not None]
        return max(known, key=lambda plan: plan.version, default=None)
