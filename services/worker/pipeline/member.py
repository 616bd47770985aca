"""A worker's part in groups, in its engine thread.

    prepare(peers)    links are up; frames of the group wait
    commit(key)       at a batch boundary: layers are given up, KV grows; a follower hands its
                      requests over, the leader parks its own; from then on frames are handled

A worker has at most one *serving* role; without one it is a replica. A role that it had before is
a *former* one for as long as somebody's KV or batches need it. Frames find their role by the key of
their group. What happens is told to the event loop as events.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from services.worker.core import EngineCore
from services.worker.engine.request import KvKey
from services.worker.engine.scheduler import Scheduler
from services.worker.facts import model_facts
from services.worker.inspection import EngineInspection, inspect_engine
from services.worker.links.base import DownReason, Link, LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import (
    Committed,
    GroupEvent,
    Phase,
    PhaseTimed,
    PrepareFailed,
)
from services.worker.pipeline.leader import PipelineLeader
from services.worker.pipeline.peers import GroupKey, GroupPeers
from services.worker.pipeline.role import Role
from services.worker.pipeline.stage import FollowerStage
from shared.errors import KunserveError
from shared.messages import TokenItem


class GroupLostError(KunserveError):
    """A member of the group that this worker serves in is gone."""


@dataclass(slots=True)
class _Prepared:
    peers: GroupPeers
    frames: list[LinkFrame] = field(default_factory=list)


class GroupMember:
    """Groups of one worker: any number prepared or former, one served in at most.

    Engine thread only.
    """

    def __init__(self, core: EngineCore, scheduler: Scheduler, runner: ModelRunner) -> None:
        self._core = core
        self._scheduler = scheduler
        self._runner = runner
        self._prepared: dict[GroupKey, _Prepared] = {}
        self._serving: Role | None = None
        self._roles: dict[GroupKey, Role] = {}  # the serving one, and former ones
        self._retired: list[GroupPeers] = []
        self._events: list[GroupEvent] = []

    # --- the layout changes ----------------------------------------------------------------------

    def prepare(self, peers: GroupPeers) -> None:
        """Keep the links of a group that may be committed; one may be down already."""
        self._prepared[peers.key] = _Prepared(peers)
        if not peers.is_connected:
            self.abandon(peers.key)
            self._events.append(PrepareFailed(peers.key, "a link of the group is down"))

    def abandon(self, key: GroupKey) -> None:
        """A prepared group will not be committed; its links are closed."""
        prepared = self._prepared.pop(key, None)
        if prepared is not None:
            prepared.peers.close()

    def commit(self, key: GroupKey, now: float) -> list[TokenItem]:
        """Serve in a prepared group from now on. The worker served alone before.

        Raises:
            ValueError: the group is not prepared, or the worker serves in one already.
        """
        if key not in self._prepared or self._serving is not None:
            raise ValueError(f"group {key.group_id} cannot be committed now")
        prepared = self._prepared.pop(key)
        self._retire()
        began_at, weights_before = time.perf_counter(), self._runner.pool.usage.weight_bytes
        self._serving = self._roles[key] = self._begin(prepared.peers)
        given_up = weights_before - self._runner.pool.usage.weight_bytes
        seconds = time.perf_counter() - began_at
        self._events.append(PhaseTimed(Phase.COMMIT, seconds, given_up))
        self._events.append(Committed(key, model_facts(self._runner)))
        return [item for frame in prepared.frames for item in self.on_frame(frame, now)]

    def _begin(self, peers: GroupPeers) -> Role:
        if not peers.is_leader:
            stage = FollowerStage(peers, self._runner, self._scheduler, self._events.append)
            stage.begin()
            return stage
        leader = PipelineLeader(peers, self._runner, self._scheduler, self._events.append)
        leader.begin()
        self._core.add_pipeline(peers.route, leader)
        return leader

    def prepare_restore(self, epoch: int) -> None:
        """Get the missing layers back for the plan of `epoch`, while the pipeline serves."""
        if self._serving is not None:
            self._serving.prepare_restore(epoch)

    def undo_restore(self) -> None:
        """The pipeline stays as it is."""
        if self._serving is not None:
            self._serving.undo_restore()

    def commit_restore(self) -> None:
        """Serve alone; what is on the pipeline, now a former one, leaves it bit by bit."""
        former, self._serving = self._serving, None
        if former is not None:
            former.commit_restore()

    def _end_what_is_over(self) -> None:
        """Forget pipelines that are dissolved, but not their links: last frames may be on them.

        They are closed when the worker joins another group.
        """
        for key, role in list(self._roles.items()):
            if role.is_over and role is not self._serving:
                self._core.remove_pipeline(role.peers.route)
                self._retired.append(role.peers)
                del self._roles[key]

    def _retire(self) -> None:
        for peers in self._retired:
            peers.close()
        self._retired.clear()

    # --- links -----------------------------------------------------------------------------------

    def on_frame(self, frame: LinkFrame, now: float) -> list[TokenItem]:
        """Handle a frame, or keep it until its group is committed; an old one is discarded."""
        key = GroupKey(frame.group_id, frame.epoch)
        role = self._roles.get(key)
        if role is not None:
            outcome = role.handle(frame, now)
            return [] if outcome is None else self._core.finish(outcome)
        if key in self._prepared:
            self._prepared[key].frames.append(frame)
        return []

    def on_down(self, link: Link, reason: DownReason) -> None:
        """A link is down.

        Raises:
            GroupLostError: a group that is being served, or was and is still needed, has lost a
                member.
        """
        detail = f"the link to {link.peer.worker_id} is down: {reason.value}"
        if any(role.peers.has_link(link) for role in self._roles.values()):
            raise GroupLostError(detail)
        for key, prepared in list(self._prepared.items()):
            if prepared.peers.has_link(link):
                self.abandon(key)
                self._events.append(PrepareFailed(key, detail))

    # --- rounds ----------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send what can be sent now; called before and after each batch."""
        for role in self._roles.values():
            role.pump()
        self._end_what_is_over()

    @property
    def is_busy(self) -> bool:
        """True while there is something to do that nobody will announce."""
        return any(role.is_busy for role in self._roles.values())

    def release(self, keys: tuple[KvKey, ...]) -> None:
        """Free what requests hold here that nobody wanted any more when they were handed over."""
        if isinstance(self._serving, FollowerStage):
            self._serving.release_unwanted(keys)

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
        for key in list(self._prepared):
            self.abandon(key)
        for role in self._roles.values():
            role.peers.close()
        self._retire()
