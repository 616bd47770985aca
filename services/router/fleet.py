"""The router's picture of the cluster: plan, members, load, and whom not to ask for a while.

Fed by `observer.py` and `dispatcher.py`, read by dispatch, health and `GET /cluster`. Pure: time
is an argument (seconds of one monotonic clock).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from services.router.dispatch import DispatchLedger, GroupLoad
from shared.layout import GroupPlan, Plan, TransitionLog
from shared.messages import LoadReport, WorkerInfo, WorkerState

#: A report older than this says nothing any more.
FRESH_SECONDS = 1.0
#: A worker whose reports, sent every 0.1 s, stay away for so long may be dead.
SUSPECT_SECONDS = 0.4
#: A worker that failed is not asked again for so long.
INHIBIT_SECONDS = 5.0


#: States in which a worker computes its stage; one that drains does until its group is restored.
_COMPUTING = frozenset({WorkerState.READY, WorkerState.DRAINING})


@dataclass(frozen=True, slots=True)
class ReceivedLoad:
    """The newest load report of a worker and when it came."""

    report: LoadReport
    received_at: float


@dataclass(slots=True)
class _Dispatching:
    """What this router itself knows of a worker."""

    ledger: DispatchLedger = field(default_factory=DispatchLedger)
    inhibited_until: float = 0.0
    is_full: bool = False  # refused a request; true until its next report
    is_suspect: bool = False  # did not answer; true until its next report


class Fleet:
    """Plan, members and loads as last heard."""

    def __init__(self, router_id: str) -> None:
        self._router_id = router_id
        self._dispatching: dict[str, _Dispatching] = {}
        self.plan: Plan | None = None
        self.transitions = TransitionLog()
        self.workers: dict[str, WorkerInfo] = {}
        self.loads: dict[str, ReceivedLoad] = {}

    def apply_plan(self, plan: Plan) -> bool:
        """Take a plan over unless it is stale or only shown (`dry_run`); True if it is news."""
        if plan.dry_run or (self.plan is not None and plan.version <= self.plan.version):
            return False
        self.plan = plan
        return True

    def apply_worker(self, info: WorkerInfo) -> None:
        """Note a worker's lease; a new process under an old name begins with a clean sheet."""
        before = self.workers.get(info.worker_id)
        if before is None or before.incarnation != info.incarnation:
            self._forget(info.worker_id)
        self.workers[info.worker_id] = info

    def remove_worker(self, worker_id: str) -> None:
        """A worker's lease is gone."""
        self._forget(worker_id)
        self.workers.pop(worker_id, None)

    def apply_load(self, report: LoadReport, now: float) -> None:
        """Note a load report; settles the bookings that it includes."""
        self.loads[report.worker_id] = ReceivedLoad(report, now)
        dispatching = self._of(report.worker_id)
        dispatching.is_full = False
        dispatching.is_suspect = False
        dispatching.ledger.settle(report.received.get(self._router_id, 0))

    def ledger(self, worker_id: str) -> DispatchLedger:
        """The bookings at one worker."""
        return self._of(worker_id).ledger

    def inhibit(self, worker_id: str, now: float) -> None:
        """Do not send to this worker for a while: it failed."""
        self._of(worker_id).inhibited_until = now + INHIBIT_SECONDS

    def mark_full(self, worker_id: str) -> None:
        """Do not send to this worker before its next report: it refused."""
        self._of(worker_id).is_full = True

    def mark_broken(self, worker_id: str) -> None:
        """The worker lost KV, so its group broke: send that nothing before its leader reports."""
        for group in self._groups_of(worker_id):
            self.mark_full(group.leader)

    def is_placed(self, worker_id: str) -> bool:
        """True if the plan has the worker serve."""
        return bool(self._groups_of(worker_id))

    def mark_suspect(self, worker_id: str) -> None:
        """It did not answer: send it nothing before its next report, and find out why."""
        self._of(worker_id).is_full = True
        self._of(worker_id).is_suspect = True

    def is_suspect(self, worker_id: str, now: float) -> bool:
        """True if the worker may be dead: it did not answer, or its reports stopped."""
        return self._of(worker_id).is_suspect or self.load_age(worker_id, now) > SUSPECT_SECONDS

    def load_age(self, worker_id: str, now: float) -> float:
        """Seconds since the worker's last report; infinite where there was none."""
        load = self.loads.get(worker_id)
        return now - load.received_at if load else float("inf")

    def serving_groups(self, now: float) -> list[GroupPlan]:
        """Groups that would take a request if they had room: ready, heard of, not failed."""
        groups = self.plan.serving_groups if self.plan is not None else ()
        return [group for group in groups if self._is_serving(group, now)]

    def candidates(self, now: float, excluded: Container[str] = ()) -> list[GroupLoad]:
        """Serving groups that did not just refuse, with their load; `excluded` are leaders."""
        return [
            self._group_load(group)
            for group in self.serving_groups(now)
            if group.leader not in excluded and not self._of(group.leader).is_full
        ]

    def longest_request(self, now: float) -> int | None:
        """Tokens (prompt and output) that some serving group can hold; None if none serves.

        What leaders say of themselves: a replica's memory bounds it, pipelines have more. The load
        says less where a layout has just begun, and members have not granted their blocks yet.
        """
        leaders = [group.leader for group in self.serving_groups(now)]
        return max((self.workers[leader].max_model_len for leader in leaders), default=None)

    def _groups_of(self, worker_id: str) -> list[GroupPlan]:
        groups = self.plan.serving_groups if self.plan is not None else ()
        return [g for g in groups if any(m.worker_id == worker_id for m in g.members)]

    def _is_serving(self, group: GroupPlan, now: float) -> bool:
        leader, *followers = (self.workers.get(member.worker_id) for member in group.members)
        if leader is None or leader.state is not WorkerState.READY:
            return False
        if any(info is None or info.state not in _COMPUTING for info in followers):
            return False
        if self.load_age(group.leader, now) > FRESH_SECONDS:
            return False
        return (
            not self.loads[group.leader].report.draining
            and self._of(group.leader).inhibited_until <= now
        )

    def _group_load(self, group: GroupPlan) -> GroupLoad:
        report = self.loads[group.leader].report
        return GroupLoad(
            group_id=group.group_id,
            leader=group.leader,
            free_blocks=report.kv_blocks_total - report.kv_blocks_used,
            waiting_blocks=report.waiting_blocks,
            booked_blocks=self._of(group.leader).ledger.booked_blocks,
        )

    def _of(self, worker_id: str) -> _Dispatching:
        return self._dispatching.setdefault(worker_id, _Dispatching())

    def _forget(self, worker_id: str) -> None:
        self.loads.pop(worker_id, None)
        dispatching = self._of(worker_id)
        dispatching.ledger.clear()
        dispatching.inhibited_until = 0.0
        dispatching.is_full = False
        dispatching.is_suspect = False
