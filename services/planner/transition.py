"""Where a transition stands: a pure function of the plan and the workers' acknowledgements.

    PREPARE --all prepared--> COMMIT --all applied--> (settling) --all settled or late--> at rest
       |                         |                        |
       +--refused, lost, late    +--refused, lost, late   +--failed, lost
          = fall back to            = break up the           = break up
            the previous groups       groups hit

Whoever takes the lead reads the same plan and the same acknowledgements, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shared.layout import GroupPlan, Plan, PlanPhase
from shared.messages import AckState, PlanAck, WorkerInfo, WorkerState


class Stage(StrEnum):
    """How far a transition is."""

    AT_REST = "at_rest"
    PREPARING = "preparing"
    COMMITTING = "committing"
    SETTLING = "settling"


class Event(StrEnum):
    """What ends a stage."""

    ANSWERED = "answered"
    REFUSED = "refused"
    LOST = "lost"
    LATE = "late"


class Move(StrEnum):
    """What the planner does about it."""

    COMMIT = "commit"
    FALL_BACK = "fall_back"
    BREAK_UP = "break_up"
    FINISH = "finish"


#: Every legal move. A COMMIT that all applied needs none: the stage is SETTLING from then on.
MOVES: Mapping[tuple[Stage, Event], Move] = {
    (Stage.PREPARING, Event.ANSWERED): Move.COMMIT,
    (Stage.PREPARING, Event.REFUSED): Move.FALL_BACK,
    (Stage.PREPARING, Event.LOST): Move.FALL_BACK,
    (Stage.PREPARING, Event.LATE): Move.FALL_BACK,
    (Stage.COMMITTING, Event.REFUSED): Move.BREAK_UP,
    (Stage.COMMITTING, Event.LOST): Move.BREAK_UP,
    (Stage.COMMITTING, Event.LATE): Move.BREAK_UP,
    (Stage.SETTLING, Event.ANSWERED): Move.FINISH,
    (Stage.SETTLING, Event.REFUSED): Move.BREAK_UP,
    (Stage.SETTLING, Event.LOST): Move.BREAK_UP,
    (Stage.SETTLING, Event.LATE): Move.FINISH,
}

#: Acknowledgements that let a stage go on.
_GOOD: Mapping[Stage, frozenset[AckState]] = {
    Stage.PREPARING: frozenset({AckState.PREPARED}),
    Stage.COMMITTING: frozenset({AckState.APPLIED, AckState.SETTLED}),
    Stage.SETTLING: frozenset({AckState.SETTLED}),
}
_BAD = frozenset({AckState.REFUSED, AckState.FAILED})


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage, what ended it if anything did, and the workers to blame.

    Attributes:
        troubled: workers that refused, were lost, or are late.
        waiting_for: workers whose answer is missing.
    """

    stage: Stage
    event: Event | None = None
    detail: str = ""
    troubled: frozenset[str] = frozenset()
    waiting_for: frozenset[str] = frozenset()

    @property
    def move(self) -> Move | None:
        """What to do now."""
        return MOVES[(self.stage, self.event)] if self.event is not None else None


def progress(
    plan: Plan,
    workers: Mapping[str, WorkerInfo],
    acks: Mapping[str, PlanAck],
    *,
    membership_held: bool,
    settle_seconds: float,
    now: float,
) -> Progress:
    """How far the transition of `plan` is.

    Args:
        membership_held: absence of a worker, or of its answer, proves nothing at the moment.
        settle_seconds: time for the exchange after COMMIT was applied or due.
        now: wall clock.
    """
    if plan.change is None:
        return Progress(Stage.AT_REST)
    answers = {
        worker_id: ack for worker_id, ack in acks.items() if (ack.term, ack.epoch) >= plan.version
    }
    needed = participants(plan, workers)
    stage = _stage(plan, needed, answers)
    lost = _lost(plan, needed, workers, membership_held=membership_held)
    if lost:
        return Progress(stage, Event.LOST, f"{', '.join(sorted(lost))} is gone", lost)
    bad = {w: answers[w] for w in needed if w in answers and answers[w].state in _BAD}
    if bad:
        detail = "; ".join(f"{w} {bad[w].state.value}: {bad[w].detail}" for w in sorted(bad))
        return Progress(stage, Event.REFUSED, detail, frozenset(bad))
    missing = frozenset(
        w for w in needed if w not in answers or answers[w].state not in _GOOD[stage]
    )
    if not missing:
        return Progress(stage, Event.ANSWERED)
    deadline = (plan.deadline_at or plan.created_at) + (
        settle_seconds if stage is Stage.SETTLING else 0.0
    )
    if now >= deadline and not membership_held:
        detail = f"no answer from {', '.join(sorted(missing))}"
        return Progress(stage, Event.LATE, detail, missing, missing)
    return Progress(stage, waiting_for=missing)


def changed_groups(plan: Plan) -> tuple[GroupPlan, ...]:
    """The groups that the transition of `plan` makes."""
    before = set(plan.change.previous_groups) if plan.change is not None else set()
    return tuple(group for group in plan.groups if group not in before)


def participants(plan: Plan, workers: Mapping[str, WorkerInfo]) -> frozenset[str]:
    """Workers whose answers the transition needs.

    These are the members of the groups it makes, without workers that joined later, and members
    of former groups that hand over before they leave.
    """
    if plan.change is None:
        return frozenset()
    now = set(plan.groups)
    before = {
        member.worker_id: group in now
        for group in plan.change.previous_groups
        for member in group.members
    }
    after = {member.worker_id for group in changed_groups(plan) for member in group.members}
    leaving = {
        worker_id
        for worker_id, is_unchanged in before.items()
        if not is_unchanged
        and worker_id in workers
        and workers[worker_id].state is WorkerState.DRAINING
    }
    return frozenset(after & before.keys() | leaving)


def _stage(plan: Plan, needed: frozenset[str], answers: Mapping[str, PlanAck]) -> Stage:
    if plan.phase is PlanPhase.PREPARE:
        return Stage.PREPARING
    applied = _GOOD[Stage.COMMITTING]
    if all(w in answers and answers[w].state in applied for w in needed):
        return Stage.SETTLING
    return Stage.COMMITTING


def _lost(
    plan: Plan,
    needed: frozenset[str],
    workers: Mapping[str, WorkerInfo],
    *,
    membership_held: bool,
) -> frozenset[str]:
    """Participants that left, or came back as another process that knows nothing."""
    known = {
        member.worker_id: member.incarnation
        for groups in (plan.change.previous_groups if plan.change else (), plan.groups)
        for group in groups
        for member in group.members
        if member.incarnation
    }
    lost = set()
    for worker_id in needed:
        info = workers.get(worker_id)
        if info is None:
            lost |= set() if membership_held else {worker_id}
        elif known.get(worker_id, info.incarnation) != info.incarnation:
            lost.add(worker_id)
    return frozenset(lost)
