"""A worker's part in groups, in its engine thread.

    prepare(...)   links are up; missing layers are loaded while the worker serves as before
    commit()       at a batch boundary: layers are given up, KV grows; a follower hands its
                   requests over, the leader parks its own or lets them go on where they run
    settled        nobody's KV lies along a layout of before any more: its memory may be used

A worker has at most one *serving* role; without one it is a replica. A role that it had before is
a *former* one for as long as somebody's KV or batches need it. Frames find their role by the key of
their group; those of the next group wait for the commit. What happens is told as events.

A commit waits where layers are given up that the pipeline of before computes: its leader makes no
more batches, waits for those in flight and says so (Quiesce); then everybody commits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.worker.core import EngineCore
from services.worker.engine.request import KvKey
from services.worker.engine.scheduler import PauseState, Scheduler
from services.worker.inspection import EngineInspection, inspect_engine
from services.worker.links.base import DownReason, Link, LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import (
    Broken,
    Committed,
    FormerLost,
    GroupEvent,
    Phase,
    PhaseTimed,
    Prepared,
    PrepareFailed,
    Settled,
    Whole,
)
from services.worker.pipeline.leader import PipelineLeader
from services.worker.pipeline.leadership import Leadership
from services.worker.pipeline.peers import GroupKey, GroupPeers
from services.worker.pipeline.proposal import Proposal
from services.worker.pipeline.reload import Reload
from services.worker.pipeline.role import Role
from services.worker.pipeline.stage import FollowerStage
from services.worker.regrouping import Regrouping
from shared.messages import TokenItem

_LINK_DOWN = "a link of the group is down"


class GroupMember:
    """Groups of one worker: one served in at most, former ones, and one that may be next.

    Engine thread only.
    """

    def __init__(self, core: EngineCore, scheduler: Scheduler, runner: ModelRunner) -> None:
        """Take a replica's parts."""
        self._core = core
        self._scheduler = scheduler
        self._runner = runner
        self._alone = scheduler.relocation.route
        self._proposal: Proposal | None = None
        self._serving: Role | None = None
        self._roles: dict[GroupKey, Role] = {}  # the serving one, and former ones
        self._leadership = Leadership(scheduler)
        self._retired: list[GroupPeers] = []
        self._unsettled: int | None = None  # epoch of the layout that is settling
        self._reload: Reload | None = None
        self._events: list[GroupEvent] = []

    # --- the layout changes ----------------------------------------------------------------------

    def prepare(self, regrouping: Regrouping, peers: GroupPeers | None) -> None:
        """Get ready for a layout that may be committed; a link of it may be down already."""
        self._close_retired()  # it takes milliseconds, which a commit has not
        self._proposal = Proposal(regrouping, peers)
        if peers is not None and not peers.is_connected:
            self._fail(_LINK_DOWN)
        elif self._serving is not None and regrouping.loads:
            self._serving.prepare(regrouping)
        else:
            self._events.append(Prepared(regrouping.epoch))

    def abandon(self) -> None:
        """What was prepared will not be committed; its links are closed, its layers given up."""
        proposal, self._proposal = self._proposal, None
        if proposal is not None and proposal.peers is not None:
            proposal.peers.close()
        if self._serving is not None:
            self._serving.undo()

    def commit(self) -> None:
        """Serve as prepared as soon as the layout before allows it.

        Nothing happens where the worker's group broke meanwhile, which was said.
        """
        if self._proposal is not None:
            self._proposal.is_due = True
            self._scheduler.pause(PauseState.STOPPED)

    def _commit_if_possible(self, now: float) -> list[TokenItem]:
        proposal = self._proposal
        if proposal is None or not proposal.is_due:
            return []
        if proposal.peers is not None and not proposal.peers.is_connected:
            return self._break(_LINK_DOWN)
        if self._core.is_computing:  # it lands in the next step, and the scheduler makes no more
            return []
        if self._serving is not None and proposal.regrouping.stops and not self._serving.is_quiet:
            return []
        self._proposal = None
        began_at, weights_before = time.perf_counter(), self._runner.pool.usage.weight_bytes
        self._change(proposal.regrouping, proposal.peers, now)
        given_up = weights_before - self._runner.pool.usage.weight_bytes
        seconds = time.perf_counter() - began_at
        self._events.append(PhaseTimed(Phase.COMMIT, seconds, given_up))
        self._events.append(Committed(proposal.regrouping.epoch))
        return [item for frame in proposal.frames for item in self.on_frame(frame, now)]

    def _change(self, regrouping: Regrouping, peers: GroupPeers | None, now: float) -> None:
        """Serve in the next layout; no batch is in flight on a pipeline that gives up layers."""
        former, self._serving = self._serving, None
        self._unsettled = regrouping.epoch
        if peers is None:
            self._serve_alone(parks=regrouping.stops)
        elif peers.is_leader:
            self._lead(peers, parks=former is None or regrouping.stops)
        else:
            self._follow(peers)
        if former is not None:
            former.leave(regrouping, now)
        self._scheduler.pause(PauseState.RUNNING)

    def _serve_alone(self, *, parks: bool) -> None:
        self._scheduler.relocation.enter(self._alone)
        if parks:
            self._scheduler.relocation.park_running()
        self._scheduler.blocks.grow(self._runner.keep(self._runner.whole))

    def _lead(self, peers: GroupPeers, *, parks: bool) -> None:
        flush = self._leadership.flush_releases
        leader = PipelineLeader(peers, self._runner, self._scheduler, self._events.append, flush)
        leader.begin(parks=parks)
        self._core.add_pipeline(peers.route, leader)
        self._leadership.leaders.append(leader)
        self._serving = self._roles[peers.key] = leader

    def _follow(self, peers: GroupPeers) -> None:
        stage = FollowerStage(
            peers, self._runner, self._scheduler, self._events.append, self._on_release
        )
        self._scheduler.relocation.recompute_outside(peers.route.worker_ids)
        stage.begin()
        self._scheduler.relocation.enter(self._alone)
        self._serving = self._roles[peers.key] = stage

    def _fail(self, reason: str) -> None:
        if self._proposal is not None:
            self._events.append(PrepareFailed(self._proposal.regrouping.epoch, reason))

    @property
    def is_grouped(self) -> bool:
        """True while it serves in a pipeline."""
        return self._serving is not None

    # --- the layout before -----------------------------------------------------------------------

    @property
    def _former(self) -> list[Role]:
        return [role for role in self._roles.values() if role is not self._serving]

    def _end_what_is_over(self) -> None:
        """Forget pipelines that are dissolved, but not their links: last frames may be on them.

        They are closed at the next commit.
        """
        for role in self._former:
            if role.is_over:
                self._forget(role)
                self._retired.append(role.peers)

    def _forget(self, role: Role) -> None:
        self._core.remove_pipeline(role.peers.route)
        self._leadership.leaders = [x for x in self._leadership.leaders if x is not role]
        del self._roles[role.peers.key]

    def _close_retired(self) -> None:
        for peers in self._retired:
            peers.close()
        self._retired.clear()

    def _settle_if_possible(self) -> None:
        """Use the memory of KV that nobody needs any more."""
        if self._unsettled is None or self._former:
            return
        if self._serving is not None:
            if not self._serving.is_settled:
                return
            self._serving.settle()
        epoch, self._unsettled = self._unsettled, None
        self._scheduler.blocks.grow(self._runner.settle())
        self._events.append(Settled(epoch))

    # --- links -----------------------------------------------------------------------------------

    def on_frame(self, frame: LinkFrame, now: float) -> list[TokenItem]:
        """Handle a frame, or keep it until its group is committed; an old one is discarded."""
        key = GroupKey(frame.group_id, frame.epoch)
        role, proposal = self._roles.get(key), self._proposal
        if role is not None:
            outcome = role.handle(frame, now)
            return [] if outcome is None else self._core.finish(outcome)
        if proposal is not None and proposal.peers is not None and proposal.peers.key == key:
            proposal.frames.append(frame)
        return []

    def on_down(self, link: Link, reason: DownReason) -> list[TokenItem]:
        """A link is down: its group is broken, or cannot be committed."""
        detail = f"the link to {link.peer.worker_id} is down: {reason.value}"
        hit = [role for role in self._roles.values() if role.peers.has_link(link)]
        if hit and self._serving is None and len(self._roles) == 1:
            return self._lose_former(hit[0], link.peer.worker_id)
        if hit:
            return self._break(detail)
        proposal = self._proposal
        if proposal is not None and proposal.peers is not None and proposal.peers.has_link(link):
            self._fail(detail)
        return []

    def _on_release(self, stage: FollowerStage, keys: Sequence[KvKey]) -> None:
        """A leader had keys freed; on another chain of the same leader their orders are void."""
        stages = [role for role in self._roles.values() if isinstance(role, FollowerStage)]
        for other in stages:
            if other is not stage and other.peers.leader == stage.peers.leader:
                other.note_gone(keys)

    # --- a group breaks --------------------------------------------------------------------------

    def break_up(self, reason: str) -> list[TokenItem]:
        """The plan has ended the group at once; nothing happens where it is broken already."""
        return self._break(reason) if self._serving is not None else []

    def _break(self, reason: str) -> list[TokenItem]:
        """Lose all requests and keep nothing but the layers that are here; load the others."""
        keys = tuple(self._roles)
        self.close()
        for role in self._roles.values():
            self._core.remove_pipeline(role.peers.route)
        self._roles.clear()
        self._leadership.leaders.clear()
        self._serving = self._proposal = self._unsettled = None
        items = self._core.lose_all()
        self._scheduler.pause(PauseState.STOPPED)
        self._scheduler.relocation.enter(self._alone)
        self._scheduler.blocks.start_over(self._runner.blocks_with(self._runner.whole))
        self._reload = Reload(self._runner, self._events.append)
        self._events.append(Broken(keys, reason))
        return items

    def _pump_reload(self, reload: Reload) -> None:
        if reload.pump():
            self._reload = None
            self._scheduler.blocks.grow(self._runner.num_blocks)
            self._scheduler.pause(PauseState.RUNNING)
            self._events.append(Whole())

    def _lose_former(self, role: Role, worker_id: str) -> list[TokenItem]:
        """A replica goes on without the pipeline that requests still leave; theirs are lost."""
        role.peers.close()
        self._forget(role)
        self._events.append(FormerLost(role.peers.key))
        blocks = self._scheduler.blocks
        items = self._core.lose_worker(worker_id)
        for follower in role.peers.followers:
            blocks.forget_worker(follower)
        blocks.stage.release_all()
        return items

    # --- rounds ----------------------------------------------------------------------------------

    def pump(self, now: float) -> list[TokenItem]:
        """Do what is due, send what can be sent; called before and after each batch."""
        if self._reload is not None:
            self._pump_reload(self._reload)
        for role in self._roles.values():
            role.pump()
        items = self._commit_if_possible(now)
        self._leadership.start_exchanges()
        self._end_what_is_over()
        self._settle_if_possible()
        return items

    @property
    def is_settled(self) -> bool:
        """True if no bytes are on their way from one layout to another."""
        return self._unsettled is None and not self.is_busy

    @property
    def is_busy(self) -> bool:
        """True while there is something to do that nobody will announce."""
        return self._reload is not None or any(role.is_busy for role in self._roles.values())

    @property
    def owes_answers(self) -> bool:
        """True while tokens are being computed here that a leader waits for."""
        return any(role.owes_answers for role in self._roles.values())

    def inspect(self) -> EngineInspection:
        """What the engine holds, and whether its books agree."""
        return inspect_engine(self._scheduler, self._runner)

    def take_events(self) -> tuple[GroupEvent, ...]:
        """What happened since the last call."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        """Close all links; the peers notice."""
        if self._proposal is not None and self._proposal.peers is not None:
            self._proposal.peers.close()
        for role in self._roles.values():
            role.peers.close()
        self._close_retired()
