"""Which workers serve, and in which groups, as long as nobody drops or restores. Pure.

Every worker that holds the whole model, is ready and is not draining is a group of its own: an
ordinary replica. A pipeline stays as it is while all its members live.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from shared.layout import GroupPlan, LayoutState, MemberPlan, Plan, Span
from shared.messages import WorkerInfo, WorkerState

#: Type and tokens of a block of a worker's KV.
KvFormat = tuple[str, int]


class WorkerVerdict(StrEnum):
    """Why a worker is in the layout, or is not."""

    SERVES = "serves"
    STARTING = "starting"
    RELOADING = "reloading"  # its group broke, and layers are missing
    DRAINING = "draining"
    PARTIAL = "partial"  # does not hold every layer
    OTHER_MODEL = "other_model"
    OTHER_FORMAT = "other_format"  # its KV is of another type, or in other blocks


_NOT_SERVING: Mapping[WorkerState, WorkerVerdict] = {
    WorkerState.STARTING: WorkerVerdict.STARTING,
    WorkerState.RELOADING: WorkerVerdict.RELOADING,
    WorkerState.DRAINING: WorkerVerdict.DRAINING,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Groups of one model, and what became of each worker."""

    model_id: str
    num_layers: int
    groups: tuple[GroupPlan, ...]
    verdicts: Mapping[str, WorkerVerdict]


def group_id_of(worker_id: str) -> str:
    """The id of the group that `worker_id` forms alone; the same for as long as it lives."""
    return f"g-{worker_id}"


def replica(worker_id: str, num_layers: int) -> GroupPlan:
    """The group that `worker_id` forms alone."""
    return GroupPlan(
        group_id=group_id_of(worker_id),
        members=(MemberPlan(worker_id=worker_id, span=Span(start=0, end=num_layers)),),
    )


def resting_state(groups: Iterable[GroupPlan]) -> LayoutState:
    """The state of a layout in which nothing is under way."""
    if any(len(group.members) > 1 for group in groups):
        return LayoutState.DROPPED
    return LayoutState.STABLE


def settled_layout(
    workers: Mapping[str, WorkerInfo],
    previous: Plan | None,
    groups: Iterable[GroupPlan] = (),
    broken: Collection[str] = (),
    *,
    absence_counts: bool = True,
) -> Layout | None:
    """The layout that these workers make without a transition.

    Args:
        workers: living workers by id.
        previous: the layout now, whose model is kept while any worker has it.
        groups: the groups in force; those that still can serve stay.
        broken: ids of groups that cannot, although their members live.
        absence_counts: False where a worker that is not there may live all the same.

    Returns:
        None where nothing is known of any model: no worker, and no previous plan.
    """
    model = _choose_model(workers, previous)
    if model is None:
        return None
    kept = [
        group
        for group in groups
        if group.group_id not in broken
        and group.tiles(model[1])
        and _can_serve(group, workers, model, absence_counts=absence_counts)
    ]
    placed = {member.worker_id for group in kept for member in group.members}
    kv_format = _choose_format(workers, model, placed)
    verdicts = {
        worker_id: _judge(info, model, kv_format, is_placed=worker_id in placed)
        for worker_id, info in workers.items()
    }
    kept += [
        replica(worker_id, model[1])
        for worker_id, verdict in verdicts.items()
        if verdict is WorkerVerdict.SERVES and worker_id not in placed
    ]
    kept.sort(key=lambda group: group.leader)
    return Layout(model[0], model[1], tuple(kept), verdicts)


def holds_all_layers(info: WorkerInfo) -> bool:
    """True if the resident layers of a worker cover the model."""
    position = 0
    for span in sorted(info.layers, key=lambda span: span.start):
        if span.start > position:
            return False
        position = max(position, span.end)
    return position >= info.num_layers


def describe_change(previous: Plan | None, layout: Layout) -> str:
    """What is different from the previous plan, for people."""
    before = {group.group_id for group in previous.groups} if previous else set()
    after = {group.group_id for group in layout.groups}
    if previous is not None and previous.model_id != layout.model_id:
        return f"the model changed from {previous.model_id} to {layout.model_id}"
    parts = []
    if added := sorted(after - before):
        parts.append(f"{', '.join(added)} joined")
    if gone := sorted(before - after):
        parts.append(f"{', '.join(gone)} left")
    return "; ".join(parts) or "the groups changed"


def _choose_model(
    workers: Mapping[str, WorkerInfo], previous: Plan | None
) -> tuple[str, int] | None:
    """The previous model while a worker has it, else the one most workers have."""
    models = Counter((info.model_id, info.num_layers) for info in workers.values())
    kept = (previous.model_id, previous.num_layers) if previous else None
    if kept is not None and (kept in models or not models):
        return kept
    return min(models, key=lambda model: (-models[model], model), default=None)


def _choose_format(
    workers: Mapping[str, WorkerInfo], model: tuple[str, int], placed: Collection[str]
) -> KvFormat | None:
    """The format of the workers that serve, else the one that most have.

    KV travels between workers, and a replay must give the tokens that it would have given.
    """
    fit = [info for info in workers.values() if (info.model_id, info.num_layers) == model]
    serving = [info for info in fit if info.worker_id in placed]
    formats = Counter((info.dtype, info.block_size) for info in serving or fit)
    return min(formats, key=lambda each: (-formats[each], each), default=None)


def _can_serve(
    group: GroupPlan,
    workers: Mapping[str, WorkerInfo],
    model: tuple[str, int],
    *,
    absence_counts: bool,
) -> bool:
    """Whether all members live. What they hold is not asked: a lease says it a little late, and a
    worker that lost its layers is another process or says that it failed.

    A member of a pipeline that drains stays until its group is restored.
    """
    is_pipeline = len(group.members) > 1
    fit = (WorkerState.READY, WorkerState.DRAINING) if is_pipeline else (WorkerState.READY,)
    for member in group.members:
        info = workers.get(member.worker_id)
        if info is None:
            if absence_counts:
                return False
            continue
        if info.state not in fit or (info.model_id, info.num_layers) != model:
            return False
        if member.incarnation not in ("", info.incarnation):
            return False
    return True


def _judge(
    info: WorkerInfo, model: tuple[str, int], kv_format: KvFormat | None, *, is_placed: bool
) -> WorkerVerdict:
    if (info.model_id, info.num_layers) != model:
        return WorkerVerdict.OTHER_MODEL
    if (info.dtype, info.block_size) != kv_format:
        return WorkerVerdict.OTHER_FORMAT
    if (verdict := _NOT_SERVING.get(info.state)) is not None:
        return verdict
    if not is_placed and not holds_all_layers(info):
        return WorkerVerdict.PARTIAL
    return WorkerVerdict.SERVES
