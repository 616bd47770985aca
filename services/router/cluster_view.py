"""`GET /cluster`: the layout, the load of each group, the workers, the past transitions, and what
the planner decided last.

A pure function of what the router has heard. The shape is part of the public contract, and the
models here are what `/openapi.json` says of it.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from services.router.fleet import Fleet
from shared.layout import DecisionNote, GroupPlan, LayoutState, Span, Transition
from shared.messages import WorkerInfo, WorkerState

NUM_TRANSITIONS = 20

#: A half-open range of layers, as JSON has it.
Layers = tuple[int, int]


class MemberView(BaseModel):
    """One stage of a group."""

    worker: str
    layers: Layers


class GroupView(BaseModel):
    """Workers that serve together, and their load as the leader reported it last."""

    id: str
    leader: str
    members: list[MemberView]
    requests_running: int
    requests_waiting: int
    kv_blocks_used: int
    kv_blocks_waiting: int = Field(description="what the waiting requests need to start")
    kv_blocks_total: int


class WorkerView(BaseModel):
    """One worker and its memory."""

    id: str
    layers: list[Layers]
    device: str
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    state: WorkerState


class ClusterView(BaseModel):
    """The answer to `GET /cluster`."""

    epoch: int
    term: int
    state: LayoutState
    groups: list[GroupView]
    workers: list[WorkerView]
    decision: DecisionNote | None = Field(description="what the planner decided last, and why")
    transitions: list[Transition] = Field(description="the last 20, oldest first")


def cluster_view(fleet: Fleet) -> ClusterView:
    """The answer to `GET /cluster`; before the first plan it shows epoch 0 and no groups."""
    plan = fleet.plan
    return ClusterView(
        epoch=plan.epoch if plan else 0,
        term=plan.term if plan else 0,
        state=plan.state if plan else LayoutState.STABLE,
        groups=[_group(fleet, group) for group in (plan.serving_groups if plan else ())],
        workers=[_worker(fleet.workers[worker_id]) for worker_id in sorted(fleet.workers)],
        decision=fleet.transitions.decision,
        transitions=list(fleet.transitions.transitions[-NUM_TRANSITIONS:]),
    )


def _group(fleet: Fleet, group: GroupPlan) -> GroupView:
    load = fleet.loads.get(group.leader)
    report = load.report if load else None
    return GroupView(
        id=group.group_id,
        leader=group.leader,
        members=[
            MemberView(worker=member.worker_id, layers=_layers(member.span))
            for member in group.members
        ],
        requests_running=report.requests_running if report else 0,
        requests_waiting=report.requests_waiting if report else 0,
        kv_blocks_used=report.kv_blocks_used if report else 0,
        kv_blocks_waiting=report.waiting_blocks if report else 0,
        kv_blocks_total=report.kv_blocks_total if report else 0,
    )


def _worker(info: WorkerInfo) -> WorkerView:
    return WorkerView(
        id=info.worker_id,
        layers=[_layers(span) for span in info.layers],
        device=info.device,
        memory_bytes=info.memory_bytes,
        weight_bytes=info.weight_bytes,
        kv_bytes=info.kv_bytes,
        free_bytes=info.free_bytes,
        state=info.state,
    )


def _layers(span: Span) -> Layers:
    return (span.start, span.end)
