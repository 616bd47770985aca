"""What the planner does and why, by the names that logs, metrics and `/cluster` show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from services.planner.layout_policy import WorkerVerdict
from shared.layout import GroupPlan, Hold, LayoutState, Plan, Transition
from shared.messages import AdminReply


class Action(StrEnum):
    """What to do with the plan."""

    KEEP = "keep"
    HOLD = "hold"  # something ought to be done and cannot be now
    PUBLISH = "publish"


class Rule(StrEnum):
    """Why."""

    # the plan and the workers
    UNCHANGED = "unchanged"
    NO_WORKER_YET = "no_worker_yet"
    MEMBERSHIP_UNCERTAIN = "membership_uncertain"
    FIRST_PLAN = "first_plan"
    WORKERS_CHANGED = "workers_changed"
    NEW_TERM = "new_term"
    STORE_LOST = "store_lost"
    BEHIND_WORKERS = "behind_workers"
    # starting a transition
    ORDERED = "ordered"
    DRAINING = "draining"
    OVERLOAD = "overload"
    FORECAST = "forecast"
    CALM = "calm"
    # not starting one
    LOADS_UNKNOWN = "loads_unknown"
    HELD_BY_OPERATOR = "held_by_operator"
    TOO_SOON = "too_soon"
    NOTHING_TO_DROP = "nothing_to_drop"
    # going on with one
    IN_TRANSITION = "in_transition"
    ALL_PREPARED = "all_prepared"
    FELL_BACK = "fell_back"
    GROUP_BROKE = "group_broke"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Target:
    """A transition to start: where to, and why."""

    rule: Rule
    state: LayoutState
    groups: tuple[GroupPlan, ...]
    cause: str
    hold: Hold | None


@dataclass(frozen=True, slots=True)
class Restraint:
    """A transition that is called for and not started, and why."""

    rule: Rule
    detail: str


#: Result of a transition in which everybody did what was planned.
APPLIED = "applied"


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision; `plan` is what to write where the action is PUBLISH.

    Attributes:
        layout_changed: the groups are others than before, and no transition looks after them.
        detail: why, in figures and names.
        finished: the transition that this decision ends.
        reply: the answer to the operator's wish; None: it is not decided yet.
    """

    action: Action
    rule: Rule
    plan: Plan | None = None
    layout_changed: bool = False
    verdicts: Mapping[str, WorkerVerdict] = field(default_factory=dict)
    detail: str = ""
    finished: Transition | None = None
    reply: AdminReply | None = None
