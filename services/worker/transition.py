"""A worker's way from one layout to another, as the plans say: the event loop's part.

The states are in `member_state.py`; what the engine does about them, in `pipeline/member.py`.
Nothing is given up before COMMIT, and COMMIT is refused by whoever is not prepared for that layout.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import structlog

from services.worker.engine_thread import (
    AbandonLayout,
    BreakUp,
    CommitLayout,
    EngineThread,
    PrepareLayout,
)
from services.worker.group_links import GroupLinks
from services.worker.links.base import LinkError
from services.worker.links.endpoint import LinkEndpoint
from services.worker.member_state import (
    ANSWERS,
    TRANSITIONS,
    Answer,
    IllegalTransitionError,
    MemberState,
    Placement,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.regrouping import Regrouping, pipeline_of
from shared.layout import GroupPlan, Plan, PlanPhase
from shared.messages import AckState

#: Time to open links where the plan sets no deadline.
_PREPARE_SECONDS = 5.0
_DRAINING = "the worker is draining"


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
        self._state = MemberState.SETTLED
        self._pipeline: GroupPlan | None = None  # that the worker serves in; None for a replica
        self._next: Regrouping | None = None  # what is prepared or committed now
        self._plan: Plan | None = None  # the newest
        self._is_draining = False
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
        """Act on a plan that is newer than any before."""
        self._plan = plan
        self._placement.term, self._placement.epoch = plan.version
        if plan.phase is PlanPhase.PREPARE:
            self._take_prepare(plan)
        else:
            self.committed = plan.version
            self._take_commit(plan)
            self.links.discard(plan.epoch)
        self._on_change()

    def _take_prepare(self, plan: Plan) -> None:
        wanted = Regrouping.of(plan, self._worker_id, self._pipeline)
        if self._state is MemberState.RELOADING and wanted.after is None:
            self.answer = None  # given when it is whole
        elif wanted.after == self._pipeline:
            self._call_off()
            self._say(AckState.PREPARED)
        elif wanted.after is not None and self._is_draining:
            self._call_off()
            self._say(AckState.REFUSED, _DRAINING)
        elif self._is_preparing and wanted == self._next:
            self._repeat()
        elif self._is_preparing or self._state is MemberState.SETTLED:
            self._call_off()
            self._prepare(plan, wanted)
        else:
            self._say(AckState.REFUSED, f"the worker is {self._state.name.lower()}")

    def _take_commit(self, plan: Plan) -> None:
        wanted = Regrouping.of(plan, self._worker_id, self._pipeline)
        if self._state is MemberState.RELOADING and wanted.after is None:
            self.answer = None  # given when it is whole
        elif wanted.after == self._pipeline:
            self._call_off()
            self._place(plan)
            self._repeat()
        elif self._state is MemberState.PREPARED and wanted == self._next:
            self._commit(plan, wanted)
        elif wanted.after is None:
            self.answer = None
            self._engine.submit(BreakUp("the plan has ended the group"))
        else:
            self._call_off()
            self._say(AckState.FAILED, "the worker is not prepared for this group")

    # --- prepare and commit ----------------------------------------------------------------------

    def _prepare(self, plan: Plan, wanted: Regrouping) -> None:
        self._enter(MemberState.PREPARING)
        self._next = wanted
        self.answer = None
        if wanted.after is None:
            self._engine.submit(PrepareLayout(wanted, None))
            return
        seconds = _PREPARE_SECONDS
        if plan.deadline_at is not None:
            seconds = max(0.1, plan.deadline_at - time.time())
        self._task = asyncio.create_task(
            self._connect(wanted, wanted.after, plan.term, seconds),
            name=f"prepare {wanted.after.group_id}",
        )

    async def _connect(
        self, wanted: Regrouping, group: GroupPlan, term: int, seconds: float
    ) -> None:
        try:
            if self._endpoint is None:
                raise LinkError("the worker takes no links yet")
            links = await self.links.connect(self._endpoint, group, term, seconds)
        except (LinkError, TimeoutError) as error:
            self._task = None
            self._refuse(str(error) or f"no link from a member within {seconds:.1f} s")
            return
        self._task = None
        peers = GroupPeers(self._worker_id, group, links)
        self._engine.submit(PrepareLayout(wanted, peers))

    def _commit(self, plan: Plan, wanted: Regrouping) -> None:
        """No request is taken for another group any more; those taken reach the engine first."""
        self._enter(MemberState.COMMITTING)
        self._pipeline = wanted.after
        self._place(plan)
        self.answer = None
        self._engine.submit(CommitLayout())

    def _refuse(self, detail: str) -> None:
        self._call_off()
        self._say(AckState.REFUSED, detail)
        self._on_change()

    def _call_off(self) -> None:
        """Give up a layout that is not committed."""
        if not self._is_preparing:
            return
        if self._task is not None:
            self._task.cancel()
            self._task = None
        else:
            self._engine.submit(AbandonLayout())
        self._enter(MemberState.SETTLED)
        self._next = None

    @property
    def _is_preparing(self) -> bool:
        return self._state in (MemberState.PREPARING, MemberState.PREPARED)

    # --- what the engine says --------------------------------------------------------------------

    def prepared(self, epoch: int) -> None:
        """Links and layers of the layout read at `epoch` are there."""
        if self._is_next(epoch) and self._state is MemberState.PREPARING:
            self._advance(MemberState.PREPARED)

    def prepare_failed(self, epoch: int, reason: str) -> None:
        """A link went down, or there is no room for layers."""
        if self._is_next(epoch) and self._is_preparing:
            self._refuse(reason)

    def applied(self, epoch: int) -> None:
        """The engine has committed."""
        if self._is_next(epoch):
            self._advance(MemberState.SETTLING)

    def settled(self, epoch: int) -> None:
        """Nothing is left on the layout before."""
        if self._is_next(epoch):
            self._next = None
            self._advance(MemberState.SETTLED)

    # --- the group breaks ------------------------------------------------------------------------

    def broken(self, reason: str) -> None:
        """The engine serves nothing any more and loads the layers that it lacks."""
        self._call_off()
        self._enter(MemberState.RELOADING)
        self._pipeline = self._next = None
        self._placement.group_id, self._placement.is_leader = "", False
        if self._is_to_be_alone:
            self.answer = None  # given when it is whole
        else:
            self._say(AckState.FAILED, reason)
        self._log.warning("group broken", reason=reason)
        self._on_change()

    def whole(self) -> None:
        """Every layer is here again: do now what the newest plan says."""
        self._enter(MemberState.SETTLED)
        if self._plan is not None:
            self.take(self._plan)

    @property
    def _is_to_be_alone(self) -> bool:
        """True if the newest plan is committed and has the worker in no pipeline."""
        plan = self._plan
        if plan is None or plan.phase is PlanPhase.PREPARE:
            return False
        return pipeline_of(plan, self._worker_id) is None

    @property
    def is_reloading(self) -> bool:
        """True while the worker cannot serve at all."""
        return self._state is MemberState.RELOADING

    # --- the worker leaves -----------------------------------------------------------------------

    def drain(self) -> None:
        """Join no pipeline any more."""
        self._is_draining = True
        if self._is_preparing and self._next is not None and self._next.after is not None:
            self._refuse(_DRAINING)

    @property
    def needed_in(self) -> GroupPlan | None:
        """The pipeline whose members need this worker: that of now, or one that requests leave."""
        if self._pipeline is None and self._next is not None and not self._is_preparing:
            return self._next.before
        return self._pipeline

    def _advance(self, state: MemberState) -> None:
        self._enter(state)
        self._repeat()
        self._on_change()

    def _is_next(self, epoch: int) -> bool:
        return self._next is not None and self._next.epoch == epoch

    # --- state -----------------------------------------------------------------------------------

    def _enter(self, state: MemberState) -> None:
        if state not in TRANSITIONS[self._state]:
            raise IllegalTransitionError(f"a member cannot go from {self._state} to {state}")
        self._log.info("transition", before=self._state.name, now=state.name)
        sys.audit("kunserve.member_state", state.name)  # for whoever wants to be there just then
        self._state = state

    def _place(self, plan: Plan) -> None:
        group = plan.group_of(self._worker_id)
        self._placement.group_id = group.group_id if group else ""
        self._placement.is_leader = group is not None and group.leader == self._worker_id

    def _repeat(self) -> None:
        """Say how far the worker is."""
        state = ANSWERS[self._state]
        if state is None:
            self.answer = None
        else:
            self._say(state)

    def _say(self, state: AckState, detail: str = "") -> None:
        self.answer = Answer(self._placement.term, self._placement.epoch, state, detail)
