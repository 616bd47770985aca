"""What an operator's `drop` or `restore` means for the layout. Pure.

`drop` without workers pairs up all groups (or frees more, where the load asks for more); with
workers it makes one pipeline of their groups, or of the one group and the partner that fits best.
`restore` makes replicas of all pipelines, or of those of the workers named.
"""

from __future__ import annotations

from services.planner.candidates import Candidate, make_candidates
from services.planner.drafts import next_epoch
from services.planner.drop_plan import (
    DropPlan,
    copies_to_free,
    plan_drop,
    plan_merge,
)
from services.planner.inputs import Inputs
from services.planner.restore_plan import plan_whole
from services.planner.rules import Rule, Target
from services.planner.steering import active_hold, describe_drop, needed_ratio
from shared.errors import KunserveError
from shared.layout import Hold, HoldKind, LayoutState, Plan
from shared.messages import AdminAction, AdminRequest


class OrderError(KunserveError):
    """An order that cannot be carried out; one sentence for the operator."""


def carry_out(wish: AdminRequest, inputs: Inputs, plan: Plan) -> Target:
    """The transition that fulfils `wish`; raises OrderError.

    Args:
        plan: the layout in force, at rest.
    """
    placed = {member.worker_id for group in plan.groups for member in group.members}
    unknown = [worker_id for worker_id in wish.workers if worker_id not in placed]
    if unknown:
        raise OrderError(f"no group has a worker {', '.join(unknown)}")
    candidates = make_candidates(plan.groups, inputs.workers, inputs.loads)
    if wish.action is AdminAction.DROP:
        return _drop(wish, inputs, candidates)
    return _restore(wish, inputs, plan, candidates)


def _drop(wish: AdminRequest, inputs: Inputs, candidates: list[Candidate]) -> Target:
    named = [candidate for candidate in candidates if _is_named(candidate, wish)]
    if not wish.workers:
        dropped = _drop_everywhere(inputs, candidates)
    elif len(named) == 1 and len(set(wish.workers)) > 1:
        raise OrderError(f"{', '.join(wish.workers)} serve in one pipeline already")
    elif len(named) == 1:
        dropped = _drop_with_partner(inputs, candidates, named[0])
    else:
        dropped = plan_merge(
            named,
            [candidate for candidate in candidates if not _is_named(candidate, wish)],
            needed_ratio=needed_ratio(inputs),
        )
    if dropped is None:
        raise OrderError(f"nothing can be dropped: {_why_not_dropped(candidates)}")
    capacity = sum(candidate.capacity_blocks for candidate in candidates)
    return Target(
        rule=Rule.ORDERED,
        state=LayoutState.DROPPING,
        groups=dropped.groups(next_epoch(inputs)),
        cause=f"an operator asked for it: {describe_drop(dropped, capacity)}",
        hold=Hold(kind=HoldKind.NO_RESTORE, until=_until(wish, inputs)),
    )


def _drop_everywhere(inputs: Inputs, candidates: list[Candidate]) -> DropPlan | None:
    lacking = inputs.pressure.lacking_blocks if inputs.pressure is not None else 0
    return plan_drop(
        candidates,
        num_merges=max(len(candidates) // 2, copies_to_free(lacking, candidates)),
        needed_ratio=needed_ratio(inputs),
    )


def _drop_with_partner(
    inputs: Inputs, candidates: list[Candidate], named: Candidate
) -> DropPlan | None:
    """The greedy's choice for one group: the smallest of the others, near, and little loaded."""
    others = [candidate for candidate in candidates if candidate is not named]
    if not others:
        return None
    partner = min(
        others, key=lambda c: (len(c.members), c.host != named.host, c.pressure, c.group.group_id)
    )
    rest = [candidate for candidate in others if candidate is not partner]
    return plan_merge(
        [named, partner],
        rest,
        needed_ratio=needed_ratio(inputs),
    )


def _restore(wish: AdminRequest, inputs: Inputs, plan: Plan, candidates: list[Candidate]) -> Target:
    chosen = {c.group.group_id for c in candidates if not wish.workers or _is_named(c, wish)}
    restored = plan_whole(candidates, chosen)
    if restored is None:
        raise OrderError(f"nothing can be restored: {_why_not_restored(wish)}")
    hold: Hold | None
    if wish.hold_seconds is not None:
        hold = Hold(kind=HoldKind.NO_DROP, until=_until(wish, inputs))
    else:
        is_all = all(len(group.members) == 1 for group in restored.groups)
        hold = None if is_all else active_hold(plan, inputs.now)
    capacity = sum(candidate.capacity_blocks for candidate in candidates)
    return Target(
        rule=Rule.ORDERED,
        state=LayoutState.RESTORING,
        groups=restored.groups,
        cause=f"an operator asked for it: KV blocks {capacity} -> {restored.capacity_blocks}",
        hold=hold,
    )


def _why_not_dropped(candidates: list[Candidate]) -> str:
    if len(candidates) > 1:
        return "there are no two groups that fit together"
    is_alone = len(candidates[0].members) == 1 if candidates else True
    return "there is only one worker" if is_alone else "all workers serve in one pipeline already"


def _why_not_restored(wish: AdminRequest) -> str:
    if not wish.workers:
        return "every worker holds every layer already"
    names = ", ".join(wish.workers)
    return f"{names} already {'hold' if len(wish.workers) > 1 else 'holds'} every layer"


def _until(wish: AdminRequest, inputs: Inputs) -> float | None:
    return inputs.now + wish.hold_seconds if wish.hold_seconds is not None else None


def _is_named(candidate: Candidate, wish: AdminRequest) -> bool:
    return any(member.worker_id in wish.workers for member in candidate.members)
