"""Which workers serve, and in which groups. Pure.

In the stable layout every worker that holds the whole model, is ready and is not draining is a
group of its own: an ordinary replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from shared.layout import GroupPlan, MemberPlan, Plan, Span
from shared.messages import WorkerInfo, WorkerState


class WorkerVerdict(StrEnum):
    """Why a worker is in the layout, or is not."""

    SERVES = "serves"
    STARTING = "starting"
    DRAINING = "draining"
    PARTIAL = "partial"  # does not hold every layer
    OTHER_MODEL = "other_model"


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


def stable_layout(workers: Mapping[str, WorkerInfo], previous: Plan | None) -> Layout | None:
    """The layout in which each worker is a whole replica.

    Args:
        workers: living workers by id.
        previous: the layout now, whose model is kept while any worker has it.

    Returns:
        None where nothing is known of any model: no worker, and no previous plan.
    """
    model = _choose_model(workers, previous)
    if model is None:
        return None
    verdicts = {worker_id: _judge(info, model) for worker_id, info in workers.items()}
    whole = Span(start=0, end=model[1])
    groups = tuple(
        GroupPlan(
            group_id=group_id_of(worker_id),
            members=(MemberPlan(worker_id=worker_id, span=whole),),
        )
        for worker_id in sorted(verdicts)
        if verdicts[worker_id] is WorkerVerdict.SERVES
    )
    return Layout(model[0], model[1], groups, verdicts)


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


def _judge(info: WorkerInfo, model: tuple[str, int]) -> WorkerVerdict:
    if (info.model_id, info.num_layers) != model:
        return WorkerVerdict.OTHER_MODEL
    if info.state is WorkerState.DRAINING:
        return WorkerVerdict.DRAINING
    if info.state is WorkerState.STARTING:
        return WorkerVerdict.STARTING
    if not holds_all_layers(info):
        return WorkerVerdict.PARTIAL
    return WorkerVerdict.SERVES
