"""A worker's part in groups, in its engine thread.

    prepare(peers)    links are up; frames of the group wait
    commit(key)       at a batch boundary: layers are given up, KV grows; a follower hands its
                      requests over, the leader parks its own; from then on frames are handled

What happens is told to the event loop as events.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.worker.core import EngineCore
from services.worker.engine.request import KvKey
from services.worker.engine.scheduler import Scheduler
from services.worker.facts import model_facts
from services.worker.links.base import DownReason, Link, LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import Committed, GroupEvent, PrepareFailed
from services.worker.pipeline.leader import PipelineLeader
from services.worker.pipeline.peers import GroupKey, GroupPeers
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
    """Groups of one worker: any number prepared, one served in at most. Engine thread only."""

    def __init__(self, core: EngineCore, scheduler: Scheduler, runner: ModelRunner) -> None:
        self._core = core
        self._scheduler = scheduler
        self._runner = runner
        self._prepared: dict[GroupKey, _Prepared] = {}
        self._peers: GroupPeers | None = None
        self._role: PipelineLeader | FollowerStage | None = None
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
        if key not in self._prepared or self._role is not None:
            raise ValueError(f"group {key.group_id} cannot be committed now")
        prepared = self._prepared.pop(key)
        self._retire()
        self._peers = peers = prepared.peers
        if peers.is_leader:
            leader = PipelineLeader(peers, self._runner, self._scheduler, self._events.append)
            leader.begin()
            self._core.add_pipeline(peers.route, leader)
            self._role = leader
        else:
            stage = FollowerStage(peers, self._runner, self._scheduler, self._events.append)
            stage.begin()
            self._role = stage
        self._events.append(Committed(key, model_facts(self._runner)))
        return [item for frame in prepared.frames for item in self._handle(frame, now)]

    def prepare_restore(self, epoch: int) -> None:
        """Get the missing layers back for the plan of `epoch`, while the pipeline serves."""
        if self._role is not None:
            self._role.prepare_restore(epoch)

    def undo_restore(self) -> None:
        """The pipeline stays as it is."""
        if self._role is not None:
            self._role.undo_restore()

    def commit_restore(self) -> None:
        """Serve alone; what is on the pipeline leaves it bit by bit."""
        if self._role is not None:
            self._role.commit_restore()

    def _end_if_over(self) -> None:
        """Forget a pipeline that is dissolved, but not its links: the last frames may be on them.

        They are closed when the worker joins another group.
        """
        if self._role is None or not self._role.is_over or self._peers is None:
            return
        self._core.remove_pipeline(self._peers.route)
        self._retired.append(self._peers)
        self._peers = self._role = None

    def _retire(self) -> None:
        for peers in self._retired:
            peers.close()
        self._retired.clear()

    # --- links -----------------------------------------------------------------------------------

    def on_frame(self, frame: LinkFrame, now: float) -> list[TokenItem]:
        """Handle a frame, or keep it until its group is committed; an old one is discarded."""
        key = GroupKey(frame.group_id, frame.epoch)
        if self._peers is not None and self._peers.key == key:
            return self._handle(frame, now)
        if key in self._prepared:
            self._prepared[key].frames.append(frame)
        return []

    def on_down(self, link: Link, reason: DownReason) -> None:
        """A link is down.

        Raises:
            GroupLostError: the group that is being served has lost a member.
        """
        detail = f"the link to {link.peer.worker_id} is down: {reason.value}"
        if self._peers is not None and self._peers.has_link(link):
            raise GroupLostError(detail)
        for key, prepared in list(self._prepared.items()):
            if prepared.peers.has_link(link):
                self.abandon(key)
                self._events.append(PrepareFailed(key, detail))

    def _handle(self, frame: LinkFrame, now: float) -> list[TokenItem]:
        match self._role:
            case PipelineLeader() as leader:
                outcome = leader.handle(frame, now)
                return [] if outcome is None else self._core.finish(outcome)
            case FollowerStage() as stage:
                stage.handle(frame)
        return []

    # --- rounds ----------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send what can be sent now; called before and after each batch."""
        if self._role is not None:
            self._role.pump()
        self._end_if_over()

    @property
    def is_busy(self) -> bool:
        """True while there is something to do that nobody will announce."""
        return self._role is not None and self._role.is_busy

    def release(self, keys: tuple[KvKey, ...]) -> None:
        """Free what requests hold here that nobody wanted any more when they were handed over."""
        if isinstance(self._role, FollowerStage):
            self._role.release_unwanted(keys)

    def take_events(self) -> tuple[GroupEvent, ...]:
        """What happened since the last call."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def close(self) -> None:
        """Close all links; the peers notice."""
        for key in list(self._prepared):
            self.abandon(key)
        if self._peers is not None:
            self._peers.close()
        self._retire()
