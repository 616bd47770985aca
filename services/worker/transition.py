"""A worker's way from one layout to another, as the plans say: the event loop's part.

The states are in `member_state.py`; what the engine does about them, in `pipeline/member.py`.
Nothing is given up before COMMIT, and COMMIT is refused by whoever is not prepared for that group.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from services.worker.engine_thread import (
    AbandonGroup,
    CommitGroup,
    CommitRestore,
    EngineThread,
    PrepareGroup,
    PrepareRestore,
    UndoRestore,
)
from services.worker.group_links import GroupLinks
from services.worker.links.base import LinkError
from services.worker.links.endpoint import LinkEndpoint
from services.worker.member_state import (
    ANSWERS,
    INCOMPLETE,
    SILENT,
    TRANSITIONS,
    Answer,
    IllegalTransitionError,
    MemberState,
    Placement,
)
from services.worker.pipeline.peers import GroupKey, GroupPeers
from shared.errors import KunserveError
from shared.layout import GroupPlan, Plan, PlanPhase
from shared.messages import AckState

#: Time to open links where the plan sets no deadline.
_PREPARE_SECONDS = 5.0


class GroupBrokenUpError(KunserveError):
    """The plan ends a pipeline whose layers this worker has given up."""


class Transition:
    """One worker's part in changes of the layout. Lives on the event loop.

    Attributes:
        committed: version of the newest plan in its COMMIT phase: older offers of links are stale.
        answer: what to acknowledge; None while there is nothing to say.
    """

    def __init__(
        self,
        worker_id: str,
        placement: Placement,
        engine: EngineThread,
        on_change: Callable[[], None],
    ) -> None:
        self.links = GroupLinks(worker_id)
        self.committed = (0, 0)
        self.answer: Answer | None = None
        self._worker_id = worker_id
        self._placement = placement
        self._engine = engine
        self._on_change = on_change
        self._endpoint: LinkEndpoint | None = None
        self._state = MemberState.ALONE
        self._group: GroupPlan | None = None  # None while ALONE
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger(component="transition")

    def start(self, endpoint: LinkEndpoint) -> None:
        """Open links with `endpoint` from now on."""
        self._endpoint = endpoint

    async def close(self) -> None:
        """End what is under way; links that no group has are closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.links.discard()

    # --- plans -----------------------------------------------------------------------------------

    def take(self, plan: Plan) -> None:
        """Act on a plan that is newer than any before.

        Raises:
            GroupBrokenUpError: the worker has given up layers that it would need now.
        """
        self._placement.term, self._placement.epoch = plan.version
        group = plan.group_of(self._worker_id)
        if plan.phase is PlanPhase.PREPARE:
            self._take_prepare(plan, group)
        else:
            self.committed = plan.version
            self._take_commit(group)
            self.links.discard(plan.epoch)
        self._on_change()

    def _take_prepare(self, plan: Plan, group: GroupPlan | None) -> None:
        is_alone = group is None or len(group.members) == 1
        if self._state in (MemberState.ALONE, MemberState.PREPARING, MemberState.PREPARED):
            if group is None or is_alone or group == self._group:
                self._repeat(AckState.PREPARED)
            else:
                self._go_alone()
                self._prepare(plan, group)
        elif is_alone and self._state is MemberState.GROUPED:
            self._enter(MemberState.RESTORING)
            self.answer = None
            self._engine.submit(PrepareRestore(plan.epoch))
        elif is_alone and self._state in (MemberState.RESTORING, MemberState.RESTORED):
            self._repeat(AckState.PREPARED)
        elif group == self._group:
            self._stay()
            self._say(AckState.PREPARED)
        else:
            self._say(AckState.REFUSED, f"the worker is {self._state.name.lower()} in its group")

    def _take_commit(self, group: GroupPlan | None) -> None:
        if group is None or len(group.members) == 1:
            self._take_alone(group)
        elif group == self._group and self._state in (MemberState.RESTORING, MemberState.RESTORED):
            self._stay()
            self._repeat(AckState.APPLIED)
        elif group == self._group and self._state is MemberState.PREPARED:
            self._commit(group)
        elif group == self._group and self._state is not MemberState.PREPARING:
            self._repeat(AckState.APPLIED)
        else:
            self._go_alone()
            self._say(AckState.REFUSED, "the worker is not prepared for this group")

    def _take_alone(self, group: GroupPlan | None) -> None:
        if self._state is MemberState.RESTORED:
            self._leave(group)
            return
        if self._state in INCOMPLETE:
            raise GroupBrokenUpError("the plan has ended this worker's group: it must start anew")
        self._go_alone()
        self._place(group)
        self._repeat(AckState.SETTLED)  # also for a planner that took over since it was first said

    # --- restore ---------------------------------------------------------------------------------

    def _leave(self, group: GroupPlan | None) -> None:
        """Take requests for itself; those on the pipeline come home or end."""
        self._enter(MemberState.LEAVING)
        self._place(group)
        self._say(AckState.APPLIED)
        self._engine.submit(CommitRestore())

    def _stay(self) -> None:
        """The restore is called off."""
        if self._state in (MemberState.RESTORING, MemberState.RESTORED):
            self._enter(MemberState.GROUPED)
            self._engine.submit(UndoRestore())

    def restored(self, key: GroupKey) -> None:
        """The engine holds every layer again."""
        if self._is_current(key) and self._state is MemberState.RESTORING:
            self._enter(MemberState.RESTORED)
            self._repeat(AckState.PREPARED)
            self._on_change()

    def dissolved(self, key: GroupKey) -> None:
        """No request is left on the group's pipeline."""
        if self._is_current(key):
            self._enter(MemberState.ALONE)
            self._group = None
            self._say(AckState.SETTLED)
            self._on_change()

    # --- prepare and commit ----------------------------------------------------------------------

    def _prepare(self, plan: Plan, group: GroupPlan) -> None:
        self._enter(MemberState.PREPARING)
        self._group = group
        self.answer = None
        seconds = _PREPARE_SECONDS
        if plan.deadline_at is not None:
            seconds = max(0.1, plan.deadline_at - time.time())
        self._task = asyncio.create_task(
            self._connect(group, plan.term, seconds), name=f"prepare {group.group_id}"
        )

    async def _connect(self, group: GroupPlan, term: int, seconds: float) -> None:
        try:
            if self._endpoint is None:
                raise LinkError("the worker takes no links yet")
            links = await self.links.connect(self._endpoint, group, term, seconds)
        except (LinkError, TimeoutError) as error:
            self._task = None
            self._refuse(str(error) or f"no link from a member within {seconds:.1f} s")
            return
        self._task = None
        self._engine.submit(PrepareGroup(GroupPeers(self._worker_id, group, links)))
        self._enter(MemberState.PREPARED)
        self._repeat(AckState.PREPARED)
        self._on_change()

    def _commit(self, group: GroupPlan) -> None:
        """No request is taken for the group before any more; those taken reach the engine first."""
        self._enter(MemberState.COMMITTING)
        self._place(group)
        self.answer = None
        self._engine.submit(CommitGroup(GroupKey(group.group_id, group.epoch)))

    def _refuse(self, detail: str) -> None:
        self._go_alone()
        self._say(AckState.REFUSED, detail)
        self._on_change()

    def _go_alone(self) -> None:
        """Give up a group that is not committed."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._group is not None and self._state is MemberState.PREPARED:
            self._engine.submit(AbandonGroup(_key(self._group)))
        if self._state in (MemberState.PREPARING, MemberState.PREPARED):
            self._enter(MemberState.ALONE)
            self._group = None

    # --- what the engine says --------------------------------------------------------------------

    def applied(self, key: GroupKey) -> None:
        """The engine has committed the group."""
        self._advance(key, MemberState.SETTLING)

    def settled(self, key: GroupKey) -> None:
        """No request is left on the layout before."""
        self._advance(key, MemberState.GROUPED)

    def prepare_failed(self, key: GroupKey, reason: str) -> None:
        """A link of a prepared group went down, or there is no room for a restore."""
        if not self._is_current(key):
            return
        if self._state is MemberState.PREPARED:
            self._refuse(reason)
        elif self._state is MemberState.RESTORING:
            self._say(AckState.REFUSED, reason)
            self._on_change()

    def _advance(self, key: GroupKey, state: MemberState) -> None:
        if self._is_current(key):
            self._enter(state)
            self._repeat(AckState.APPLIED)
            self._on_change()

    def _is_current(self, key: GroupKey) -> bool:
        return self._group is not None and _key(self._group) == key

    # --- state -----------------------------------------------------------------------------------

    def _enter(self, state: MemberState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise IllegalTransitionError(f"a member cannot go from {self._state} to {state}")
        self._log.info("transition", before=self._state.name, now=state.name)
        self._state = state

    def _place(self, group: GroupPlan | None) -> None:
        self._placement.group_id = group.group_id if group else ""
        self._placement.is_leader = group is not None and group.leader == self._worker_id

    def _repeat(self, otherwise: AckState) -> None:
        """Say how far the worker is; `otherwise` where its state says nothing."""
        if self._state in SILENT:
            self.answer = None
        else:
            self._say(ANSWERS.get(self._state, otherwise))

    def _say(self, state: AckState, detail: str = "") -> None:
        self.answer = Answer(self._placement.term, self._placement.epoch, state, detail)


def _key(group: GroupPlan) -> GroupKey:
    return GroupKey(group.group_id, group.epoch)
