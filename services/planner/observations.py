"""What the planner hears of workers: their acknowledgements and their load. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.planner.pressure import GroupLoad
from services.planner.rules import APPLIED
from shared.layout import GroupPlan, Plan, Transition
from shared.messages import AckState, LoadReport, PlanAck, QueueReport

#: What a worker says that did as it was told.
_DONE = frozenset({AckState.APPLIED, AckState.SETTLED})


class LoadBoard:
    """The newest load report of each worker; a report too old says nothing."""

    def __init__(self, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._reports: dict[str, tuple[LoadReport, float]] = {}

    def record(self, report: LoadReport, now: float) -> None:
        """Note a report."""
        self._reports[report.worker_id] = (report, now)

    def forget(self, worker_id: str) -> None:
        """The worker has left."""
        self._reports.pop(worker_id, None)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block, the same on all workers of a model; 1 before the first report."""
        return max((report.block_size for report, _ in self._reports.values()), default=1)

    @property
    def newest_epoch(self) -> int:
        """The highest epoch that any report carries."""
        return max((report.epoch for report, _ in self._reports.values()), default=0)

    def group_loads(
        self, groups: Iterable[GroupPlan], now: float
    ) -> tuple[dict[str, GroupLoad], frozenset[str]]:
        """The loads of `groups` by id, and the leaders without a fresh report about their group."""
        oldest = now - self._stale_seconds
        loads: dict[str, GroupLoad] = {}
        unknown: set[str] = set()
        for group in groups:
            report, received_at = self._reports.get(group.leader, (None, 0.0))
            if report is None or received_at < oldest or report.group_id != group.group_id:
                unknown.add(group.leader)
                continue
            loads[group.group_id] = GroupLoad(
                report.kv_blocks_total, report.kv_blocks_used, report.waiting_blocks
            )
        return loads, frozenset(unknown)


class QueueBoard:
    """What waits in each router, where no worker has it; a report too old says nothing."""

    def __init__(self, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._reports: dict[str, tuple[QueueReport, float]] = {}

    def record(self, report: QueueReport, now: float) -> None:
        """Note a report; a router without a queue is forgotten."""
        if report.requests_waiting:
            self._reports[report.router_id] = (report, now)
        else:
            self._reports.pop(report.router_id, None)

    def waiting_blocks(self, block_size: int, now: float) -> int:
        """KV blocks of `block_size` tokens that all of it needs to start.

        Each request counts half a block more than its tokens fill, since none ends with a block.
        """
        oldest = now - self._stale_seconds
        self._reports = {r: each for r, each in self._reports.items() if each[1] >= oldest}
        num_tokens = sum(report.waiting_tokens for report, _ in self._reports.values())
        num_requests = sum(report.requests_waiting for report, _ in self._reports.values())
        return math.ceil(num_tokens / block_size + num_requests / 2)


@dataclass(slots=True)
class _Pending:
    plan: Plan
    members: frozenset[str]
    started_at: float
    deadline: float

    def finished(self, result: str, now: float) -> Transition:
        """What the log of transitions says of it."""
        return Transition(
            term=self.plan.term,
            epoch=self.plan.epoch,
            state=self.plan.state,
            cause=self.plan.reason,
            started_at=self.plan.created_at,
            phase_seconds={self.plan.phase.value: round(now - self.started_at, 6)},
            result=result,
        )


class AckBoard:
    """Who applied what, and whether the latest plan is applied by all its members.

    Times are seconds of one monotonic clock; a transition shows `plan.created_at`.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._acks: dict[str, PlanAck] = {}
        self._applied_at: dict[str, float] = {}
        self._pending: _Pending | None = None

    def record(self, ack: PlanAck, wall_now: float = 0.0) -> None:
        """Note an acknowledgement; older ones of the same worker are replaced."""
        before = self._acks.get(ack.worker_id)
        version = (ack.term, ack.epoch)
        if before is not None and version < (before.term, before.epoch):
            return
        is_known = (
            before is not None and (before.term, before.epoch) == version and before.state in _DONE
        )
        if ack.state in _DONE and not is_known:
            self._applied_at[ack.worker_id] = wall_now
        self._acks[ack.worker_id] = ack

    def forget(self, worker_id: str) -> None:
        """The worker's acknowledgement was removed."""
        self._acks.pop(worker_id, None)
        self._applied_at.pop(worker_id, None)

    @property
    def latest(self) -> Mapping[str, PlanAck]:
        """The latest acknowledgement of each worker."""
        return self._acks

    @property
    def applied_at(self) -> Mapping[str, float]:
        """Wall clock at which each worker was first heard to have applied what it last applied."""
        return self._applied_at

    @property
    def worker_ids(self) -> frozenset[str]:
        """Workers whose acknowledgement is known."""
        return frozenset(self._acks)

    @property
    def applied(self) -> tuple[int, int]:
        """The highest term and the highest epoch that any worker prepared or applied."""
        good = _DONE | {AckState.PREPARED}
        applied = [ack for ack in self._acks.values() if ack.state in good]
        return (
            max((ack.term for ack in applied), default=0),
            max((ack.epoch for ack in applied), default=0),
        )

    def expect(self, plan: Plan, now: float) -> Transition | None:
        """Wait for every member of `plan`; returns the transition that it supersedes, if any."""
        superseded = self._pending
        members = frozenset(member.worker_id for group in plan.groups for member in group.members)
        self._pending = _Pending(plan, members, now, now + self._timeout_seconds)
        if superseded is None:
            return None
        return superseded.finished(f"superseded by epoch {plan.epoch}", now)

    def settle(self, living: Iterable[str], now: float) -> Transition | None:
        """The finished transition, once: all living members answered, or the time is up."""
        pending = self._pending
        if pending is None:
            return None
        version = pending.plan.version
        answers = {
            worker_id: ack
            for worker_id, ack in self._acks.items()
            if worker_id in pending.members and (ack.term, ack.epoch) >= version
        }
        missing = sorted((pending.members & frozenset(living)) - answers.keys())
        if missing and now < pending.deadline:
            return None
        self._pending = None
        return pending.finished(_result(answers, missing), now)


def _result(answers: dict[str, PlanAck], missing: list[str]) -> str:
    problems = [
        f"{worker_id} {ack.state.value}: {ack.detail}"
        for worker_id, ack in sorted(answers.items())
        if ack.state in (AckState.REFUSED, AckState.FAILED)
    ]
    if missing:
        problems.append(f"no answer from {', '.join(missing)}")
    return "; ".join(problems) or APPLIED
