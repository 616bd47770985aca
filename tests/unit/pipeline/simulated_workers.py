"""Workers without processes, threads or time: whoever tests them says what happens next.

    planner (SimCluster)  --plan-->  Transition --commands--> GroupMember, Scheduler, MemoryPool
                          <--ack---             <--events----      |  ^ frames
                                                                   v  |
                                                         SimLink to every peer

Transition, links' bookkeeping, engine, memory and model are a worker's own. Only what is between
them is simulated: nothing arrives anywhere before it is delivered.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from services.worker.channels.base import TensorChannel
from services.worker.channels.host import HostChannel
from services.worker.engine_thread import (
    AbandonLayout,
    Command,
    CommitLayout,
    EngineThread,
    FrameReceived,
    LinkDown,
    PrepareLayout,
)
from services.worker.facts import model_facts
from services.worker.identity import Identity
from services.worker.links.base import (
    DownReason,
    LinkClass,
    LinkDownError,
    LinkFrame,
    LinkPeer,
    PeerMemory,
)
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.handshake import LinkRefusedError
from services.worker.links.link import StreamLink
from services.worker.member_state import Placement
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import (
    Committed,
    GroupEvent,
    HandedOver,
    Prepared,
    PrepareFailed,
    Settled,
)
from services.worker.pipeline.handover import pack_request
from services.worker.pipeline.messages import FrameKind, HandOver
from services.worker.transition import Transition
from shared.layout import Plan, Span
from shared.messages import PlanAck, TokenItem, WorkerInfo, WorkerState
from tests.unit.pipeline.pipeline_engine import make_engine, memory_of

#: Bulk frames that a link takes before it refuses more.
_MOST_BULK = 2


@dataclass(eq=False)
class SimLink:
    """One end of a link; frames wait in it until somebody delivers them to the other end."""

    owner: SimWorker
    peer: LinkPeer
    shares_memory: bool
    other: SimLink | None = None
    is_up: bool = True
    waiting: deque[tuple[LinkClass, LinkFrame]] = field(default_factory=deque)
    channel: TensorChannel = field(default_factory=lambda: HostChannel(torch.device("cpu")))

    @property
    def peer_memory(self) -> PeerMemory | None:
        if not (self.shares_memory and self.is_up) or self.other is None:
            return None
        return self.other.owner.memory

    def send(self, frame: LinkFrame, link_class: LinkClass, on_released: object = None) -> bool:
        """Let a frame wait; buffers are copied, so that nobody can change them any more."""
        if not self.is_up:
            raise LinkDownError("the link is down")
        if link_class is not LinkClass.CONTROL and self._num_waiting(link_class) >= _MOST_BULK:
            return False
        buffers = [memoryview(bytearray(buffer)) for buffer in frame.buffers]
        copy = LinkFrame(frame.kind, frame.group_id, frame.epoch, frame.header, buffers)
        self.waiting.append((link_class, copy))
        return True

    def deliver(self, *, bulk: bool) -> bool:
        """The next CONTROL frame arrives, or bulk that no CONTROL frame was sent before."""
        for position, (link_class, frame) in enumerate(self.waiting):
            if (link_class is not LinkClass.CONTROL) is bulk:
                del self.waiting[position]
                assert self.other is not None
                self.other.owner.submit(FrameReceived(frame))
                return True
            if link_class is LinkClass.CONTROL:
                return False
        return False

    def close(self) -> None:
        """Both ends are down; the other owner is told."""
        if self.is_up and self.other is not None:
            self.is_up = self.other.is_up = False
            self.waiting.clear()
            down = LinkDown(cast(StreamLink, self.other), DownReason.CLOSED_BY_PEER)
            self.other.owner.submit(down)

    def _num_waiting(self, link_class: LinkClass) -> int:
        return sum(each is link_class for each, _ in self.waiting)


@dataclass
class SimEndpoint:
    """Opens links between simulated workers, as the handshake would."""

    owner: SimWorker
    workers: dict[str, SimWorker]
    links: list[SimLink]

    async def open(
        self, peer: LinkPeer, *, num_activations: int, timeout_seconds: float
    ) -> SimLink:
        other = self.workers[peer.worker_id]
        if (peer.term, peer.epoch) < other.transition.committed:
            raise LinkRefusedError(f"{peer.worker_id} has a newer plan")
        shares_memory = len(self.links) % 4 == 0  # some links do, some do not
        near = SimLink(self.owner, peer, shares_memory)
        own_name = LinkPeer(self.owner.worker_id, peer.group_id, peer.term, peer.epoch)
        far = SimLink(other, own_name, shares_memory, near)
        near.other = far
        self.links += [near, far]
        other.transition.links.on_link(cast(StreamLink, far))
        return near


class SimWorker:
    """A worker in whose parts things happen only when they are told to."""

    def __init__(
        self,
        worker_id: str,
        runner: ModelRunner,
        workers: dict[str, SimWorker],
        links: list[SimLink],
        *,
        late: bool,
    ) -> None:
        self.worker_id = worker_id
        self.engine = make_engine(worker_id, runner, late=late)
        self.memory = memory_of(runner)
        self.placement = Placement()
        self.transition = Transition(
            worker_id, self.placement, cast(EngineThread, self), lambda: None
        )
        self.transition.start(cast(LinkEndpoint, SimEndpoint(self, workers, links)))
        self.commands: deque[Command] = deque()
        self.events: deque[GroupEvent] = deque()
        self.items: list[TokenItem] = []
        self._identity = Identity(worker_id, f"{worker_id}-1", "host", 1, "tiny", 0.0)

    def submit(self, command: Command) -> None:
        """What the event loop and the links' threads have for the engine."""
        self.commands.append(command)

    # --- as a planner sees it --------------------------------------------------------------------

    @property
    def info(self) -> WorkerInfo:
        facts = model_facts(self.engine.runner)
        return self._identity.info(facts, WorkerState.READY, self.placement.epoch)

    @property
    def ack(self) -> PlanAck | None:
        answer = self.transition.answer
        if answer is None:
            return None
        return PlanAck(
            worker_id=self.worker_id,
            term=answer.term,
            epoch=answer.epoch,
            state=answer.state,
            detail=answer.detail,
        )

    def follow(self, plan: Plan, living: object) -> None:
        """Nothing: a plan is seen when `see` says so."""

    def holds(self, span: Span) -> bool:
        """Whether all layers of a span are here."""
        return all(
            any(layer in part for part in self.engine.runner.resident_layers)
            for layer in range(span.start, span.end)
        )

    # --- what may happen -------------------------------------------------------------------------

    def see(self, plan: Plan, loop: asyncio.AbstractEventLoop) -> None:
        """Read the plan, as `LayoutFollower` does."""
        if plan.version > (self.placement.term, self.placement.epoch):
            self.on_loop(loop, lambda: self.transition.take(plan))

    def on_loop(self, loop: asyncio.AbstractEventLoop, call: Any) -> None:
        """Call something on the event loop, and let tasks run as far as they can."""

        async def run() -> None:
            call()
            for _ in range(5):
                await asyncio.sleep(0)

        loop.run_until_complete(run())

    def turn(self, most_commands: int) -> None:
        """One round of the engine thread, with as many commands as it has got so far."""
        now, engine = time.monotonic(), self.engine
        for _ in range(min(most_commands, len(self.commands))):
            self.items += self._apply(self.commands.popleft(), now)
        self.items += engine.member.pump(now)
        self.items += engine.core.step(now)
        self.items += engine.member.pump(now)
        engine.runner.pool.unmap_stale(engine.runner.pool.budget_bytes)
        self.events.extend(engine.member.take_events())

    def _apply(self, command: Command, now: float) -> list[TokenItem]:
        member = self.engine.member
        match command:
            case FrameReceived(frame):
                return member.on_frame(frame, now)
            case PrepareLayout(regrouping, peers):
                member.prepare(regrouping, peers)
            case CommitLayout():
                member.commit()
            case AbandonLayout():
                member.abandon()
            case LinkDown(link, reason):
                return member.on_down(link, reason)
        return []

    def hear(self, loop: asyncio.AbstractEventLoop, unwanted: set[str]) -> None:
        """The event loop takes in what the engine said so far."""
        while self.events:
            event = self.events.popleft()
            self.on_loop(loop, lambda event=event: self._handle(event, unwanted))

    def _handle(self, event: GroupEvent, unwanted: set[str]) -> None:
        match event:
            case Prepared(epoch):
                self.transition.prepared(epoch)
            case PrepareFailed(epoch, reason):
                self.transition.prepare_failed(epoch, reason)
            case Committed(epoch):
                self.transition.applied(epoch)
            case Settled(epoch):
                self.transition.settled(epoch)
            case HandedOver():
                self._hand_over(event, unwanted)

    def _hand_over(self, event: HandedOver, unwanted: set[str]) -> None:
        now = time.monotonic()
        requests = [
            pack_request(request, None if request.request_id in unwanted else (), now)
            for request in event.requests
        ]
        message = HandOver(
            worker_id=self.worker_id, num_blocks=event.num_blocks, requests=tuple(requests)
        )
        event.peers.send(event.heir, FrameKind.HAND_OVER, message)

    @property
    def is_still(self) -> bool:
        """Whether nothing waits to be told to engine or event loop."""
        return not self.commands and not self.events
