"""A stage behind the leader: computes what it is sent, and keeps KV by key.

It knows no requests. Everything about its blocks is decided by the leader, which counts them; the
ids are its own. Runs in the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

import structlog

from services.worker.engine.request import KvKey
from services.worker.engine.scheduler import Scheduler
from services.worker.links.base import LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.adoption import adopt_all
from services.worker.pipeline.events import EventSink, HandedOver, Phase
from services.worker.pipeline.messages import (
    Capacity,
    Dissolve,
    Filled,
    FrameKind,
    GiveBack,
    HandOver,
    Microbatch,
    Order,
    Quiesce,
    Release,
    Retreat,
    Settle,
    ShrinkRequest,
    TakenOver,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.phase_timer import PhaseTimer
from services.worker.pipeline.restoration import Restoration, RestorationState
from services.worker.pipeline.retreat import retreat
from services.worker.pipeline.stage_batches import StageBatches
from services.worker.pipeline.traffic import BulkTraffic
from services.worker.regrouping import Regrouping


class _StageState(Enum):
    """Only ever goes on."""

    SERVING = auto()  # whatever is free here is the leader's
    QUIET = auto()  # no batch will come any more; layers may be given up
    FORMER = auto()  # this worker serves in another layout


class FollowerStage:
    """A worker that another one leads, from its commit on."""

    def __init__(
        self,
        peers: GroupPeers,
        runner: ModelRunner,
        scheduler: Scheduler,
        emit: EventSink,
        on_release: Callable[[FollowerStage, Sequence[KvKey]], None],
    ) -> None:
        """Take a worker's scheduler, which has no requests after `begin`.

        Args:
            on_release: told of all keys that the leader wants freed.
        """
        self.peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._blocks = scheduler.blocks.stage
        self._emit = emit
        self._on_release = on_release
        self._timer = PhaseTimer(emit)
        self._traffic = BulkTraffic(peers, runner, self._table, self._tell_filled)
        self._batches = StageBatches(peers, runner, self._blocks)
        self._restoration: Restoration | None = None
        self._gone: set[KvKey] = set()
        self._kept: Sequence[KvKey] | None = None  # all that layers given up are to keep
        self._early: list[HandOver] = []
        self._state = _StageState.SERVING
        self._is_settled = False
        self._is_dissolved = False
        self._log = structlog.get_logger(component="stage", group=peers.key.group_id)

    def begin(self) -> None:
        """Serve the layers of this stage and no others; all requests go to the leader.

        No batch may be in flight.
        """
        requests = self._scheduler.relocation.hand_over_all()
        self._scheduler.blocks.grow(self._runner.keep(self.peers.span))
        leader, num_blocks = self.peers.leader, self._lend_free()
        self._emit(HandedOver(self.peers, leader, tuple(requests), num_blocks))

    def handle(self, frame: LinkFrame, now: float) -> None:
        """Act on a frame from the leader, from the stage before, or with KV.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        match frame.kind:
            case FrameKind.MICROBATCH:
                self._batches.run(Microbatch.decode(frame.header), frame.buffers)
            case FrameKind.RELEASE:
                self._release(Release.decode(frame.header))
            case FrameKind.ORDER:
                self._obey(Order.decode(frame.header))
            case FrameKind.RETREAT:
                self._retreat(Retreat.decode(frame.header))
            case FrameKind.SETTLE:
                self._note_settled(Settle.decode(frame.header))
            case FrameKind.GIVE_BACK:
                self._take_back(GiveBack.decode(frame.header))
            case FrameKind.QUIESCE:
                self._quiesce(Quiesce.decode(frame.header))
            case FrameKind.HAND_OVER:
                self._adopt(HandOver.decode(frame.header), now)
            case FrameKind.DISSOLVE:
                self._dissolve(Dissolve.decode(frame.header))
            case _:
                self._traffic.handle(frame)

    def pump(self) -> None:
        """Answer with tokens, load a part of the model, lend what is free, send KV: what is due."""
        self._batches.answer()
        if self._restoration is not None:
            self._restoration.pump()
        elif self._state is _StageState.SERVING:
            self._retreat_if_possible()
            self._offer_free()
        self._traffic.pump()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        is_loading = self._restoration is not None and self._restoration.is_busy
        return is_loading or self._traffic.is_busy

    @property
    def owes_answers(self) -> bool:
        """True while tokens are being computed here that the leader waits for."""
        return self._batches.owes_answers

    # --- the next layout -------------------------------------------------------------------------

    def prepare(self, regrouping: Regrouping) -> None:
        """Get what is needed next and is missing here, when the leader has made room."""
        own, self._kept = self.peers.worker_id, None
        span = regrouping.span_after(own)
        restoration = Restoration(
            self._runner, self._traffic.weights, self._emit, regrouping.epoch, span
        )
        self._restoration = restoration
        request = ShrinkRequest(
            worker_id=own, epoch=restoration.epoch, num_blocks=restoration.num_blocks
        )
        self.peers.send(self.peers.leader, FrameKind.SHRINK_REQUEST, request)

    def undo(self) -> None:
        """The pipeline stays."""
        if self._restoration is not None:
            self._scheduler.blocks.grow(self._restoration.undo())
            self._restoration = None
            self._offer_free()  # before anything else that may be prepared

    @property
    def is_quiet(self) -> bool:
        """True if the leader has said that no batch will come any more."""
        return self._state is _StageState.QUIET

    def leave(self, regrouping: Regrouping, now: float) -> None:
        """Another layout serves from now on; this pipeline goes on until its leader ends it."""
        self._restoration = None
        self._state = _StageState.FORMER
        for message in self._early:
            self._adopt(message, now)

    def _adopt(self, message: HandOver, now: float) -> None:
        """Take over requests that wait, once this worker leads."""
        if self._state is not _StageState.FORMER:
            self._early.append(message)
        else:
            route = self._scheduler.relocation.route
            adopt_all(self._scheduler, message, route, self._emit, now)
            taken = TakenOver(worker_id=self.peers.worker_id)
            self.peers.send(self.peers.leader, FrameKind.TAKEN_OVER, taken)

    @property
    def is_over(self) -> bool:
        """True when another layout serves here and nobody needs this one any more."""
        return self._is_dissolved and self._state is _StageState.FORMER

    def _take_back(self, message: GiveBack) -> None:
        """The leader books less here from now on: layers shall come, or requests left."""
        self.peers.send_next(FrameKind.GIVE_BACK, message)
        self._blocks.take_back(message.num_blocks.get(self.peers.worker_id, 0))
        restoration = self._restoration
        if restoration is None or restoration.epoch != message.epoch:
            return
        if restoration.state is RestorationState.SHRINKING:
            restoration.shrunk(self._scheduler.blocks.shrink(0, ()))

    def _quiesce(self, message: Quiesce) -> None:
        self.peers.send_next(FrameKind.QUIESCE, message)
        if self._state is _StageState.SERVING:
            self._state = _StageState.QUIET

    def _dissolve(self, message: Dissolve) -> None:
        self.peers.send_next(FrameKind.DISSOLVE, message)
        self._is_dissolved = True

    # --- the layout before -----------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """True if the leader has said that no request is left on another route."""
        return self._is_settled

    def settle(self) -> None:
        """No KV of layers given up is needed any more."""
        self._timer.over(Phase.EXCHANGE, self._traffic.kv.num_bytes, self._traffic.kv.began_at)

    def _retreat(self, message: Retreat) -> None:
        self.peers.send_next(FrameKind.RETREAT, message)
        self._kept = message.keys.get(self.peers.worker_id, self._kept)

    def _retreat_if_possible(self) -> None:
        """Do what the leader wants as soon as nobody reads what may move."""
        if self._kept is not None and not self._traffic.kv.is_read:
            retreat(self._runner, self._scheduler, self._blocks.owners_of(self._kept))
            self._kept = None

    def _note_settled(self, message: Settle) -> None:
        self.peers.send_next(FrameKind.SETTLE, message)
        self._is_settled = True

    # --- KV --------------------------------------------------------------------------------------

    def _release(self, message: Release) -> None:
        self.peers.send_next(FrameKind.RELEASE, message)
        keys = message.keys.get(self.peers.worker_id, ())
        for key in keys:
            self._blocks.release(key)
        self._on_release(self, [key for key in keys if key not in self._gone])
        self._gone.difference_update(keys)

    def note_gone(self, keys: Sequence[KvKey]) -> None:
        """The leader had keys freed on the way of another pipeline that it leads here.

        An order of before, still on its way down this chain, must not take room for them again.
        """
        self._gone.update(keys)

    def _obey(self, order: Order) -> None:
        """Make room for KV that will come, and send what others need."""
        self.peers.send_next(FrameKind.ORDER, order)
        if order.key in self._gone:
            return
        here = self.peers.worker_id
        try:
            if any(transfer.destination == here for transfer in order.transfers):
                self._blocks.extend(order.key, order.num_tokens)
            self._traffic.kv.obey(order)
        except Exception as error:  # one request's misfortune
            self._log.exception("KV cannot travel", request=order.key.request_id)
            self._send_filled(Filled(key=order.key, worker_id=here, error=str(error)))

    def _table(self, key: KvKey) -> Sequence[int] | None:
        try:
            return self._blocks.block_table(key)
        except KeyError:
            return None

    def _tell_filled(self, key: KvKey) -> None:
        self._send_filled(Filled(key=key, worker_id=self.peers.worker_id))

    def _send_filled(self, filled: Filled) -> None:
        self.peers.send(self.peers.leader, FrameKind.FILLED, filled)

    def _lend_free(self) -> int:
        """Let the leader book whatever is free; returns how much that is."""
        num_blocks = self._scheduler.blocks.num_free(self.peers.worker_id)
        self._blocks.lend(num_blocks)
        return num_blocks

    def _offer_free(self) -> None:
        """Lend what is free, and say so."""
        num_blocks = self._lend_free()
        if num_blocks:
            capacity = Capacity(worker_id=self.peers.worker_id, num_blocks=num_blocks)
            self.peers.send(self.peers.leader, FrameKind.CAPACITY, capacity)
