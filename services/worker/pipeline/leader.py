"""Stage 0 of a pipeline: sends the scheduler's batches into it, and orders KV to travel.

    submit(batch)  -> embedding, own layers -> next stage ... last stage -> handle -> outcome
    pump()         -> releases, orders, and, when no request is left behind, Settle

Runs in the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from services.worker.batch_io import BatchOutcome, sampling_rows, sequence_slices
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.relocation import RelocationError
from services.worker.engine.request import KvKey, Request, RequestKey, RequestStatus
from services.worker.engine.routes import Transfer
from services.worker.engine.scheduler import Scheduler
from services.worker.facts import model_facts
from services.worker.links.base import LinkFrame
from services.worker.model.batch import make_batch
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SampledToken
from services.worker.pipeline.events import Adopted, Dissolved, EventSink, Phase, Settled
from services.worker.pipeline.handover import unpack_request
from services.worker.pipeline.kv_courier import KvCourier
from services.worker.pipeline.kv_transfer import as_buffer
from services.worker.pipeline.leader_restore import LeaderRestore
from services.worker.pipeline.messages import (
    Capacity,
    Dissolve,
    Filled,
    FrameKind,
    GiveBack,
    HandOver,
    KvPart,
    Order,
    Release,
    RequestMessage,
    Settle,
    ShrinkRequest,
    Tokens,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.phase_timer import PhaseTimer
from services.worker.pipeline.rows import microbatch

#: Requests whose KV travels at once: enough to keep the links busy between two batches.
_MAX_EXCHANGES = 4


class PipelineLeader:
    """What the leader of a group does with its links, from its commit on."""

    def __init__(
        self, peers: GroupPeers, runner: ModelRunner, scheduler: Scheduler, emit: EventSink
    ) -> None:
        """Take the scheduler that serves the group from `begin` on."""
        self.peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._emit = emit
        self._timer = PhaseTimer(emit)
        self._was_idle = True
        self._courier = KvCourier(peers, runner, self._table)
        self._in_flight: dict[int, SchedulerOutput] = {}
        self._num_orders = 0
        self._awaited = set(peers.followers)  # have not handed over yet
        self._is_settled = False
        self._restore: LeaderRestore | None = None
        self._shrink_requests: list[ShrinkRequest] = []
        self.is_over = False
        self._log = structlog.get_logger(component="leader", group=peers.key.group_id)

    def begin(self) -> None:
        """Give layers up and park all requests that have KV; no batch may be in flight."""
        self._scheduler.relocation.enter(self.peers.route)
        self._scheduler.relocation.park_running()
        self._scheduler.blocks.grow(self._runner.keep(self.peers.span))
        self._was_idle = not self._scheduler.requests

    def handle(self, frame: LinkFrame, now: float) -> BatchOutcome | None:
        """Act on a frame of a follower; a batch may have come back with it.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        match frame.kind:
            case FrameKind.TOKENS:
                return self._outcome(Tokens.decode(frame.header))
            case FrameKind.HAND_OVER:
                self._take_over(HandOver.decode(frame.header), now)
            case FrameKind.CAPACITY:
                capacity = Capacity.decode(frame.header)
                self._scheduler.blocks.add_capacity(capacity.worker_id, capacity.num_blocks)
            case FrameKind.KV_PART:
                part = KvPart.decode(frame.header)
                self._note_filled(self._courier.take(part, frame.buffers[0]))
            case FrameKind.FILLED:
                self._filled(Filled.decode(frame.header))
            case FrameKind.SHRINK_REQUEST:
                self._shrink_requests.append(ShrinkRequest.decode(frame.header))
            case _:
                raise ValueError(f"a leader has no use for a frame of kind {frame.kind}")
        return None

    def pump(self) -> None:
        """Send what can be sent, order what can travel, settle when nothing is left to."""
        if self._restore is not None:
            self._pump_restore(self._restore)
        self._flush_releases()
        if not self._awaited:  # before, the stages seem to have no blocks at all
            self._start_exchanges()
        self.peers.push_bulk()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        return self.peers.has_backlog or (self._restore is not None and self._restore.is_busy)

    # --- restore ---------------------------------------------------------------------------------

    def prepare_restore(self, epoch: int) -> None:
        """Get the missing layers back while the pipeline serves."""
        self._restore = LeaderRestore(
            self.peers, self._runner, self._scheduler, self._emit, self._send_give_back, epoch
        )

    def undo_restore(self) -> None:
        """The pipeline stays."""
        if self._restore is not None:
            self._restore.undo()
            self._restore = None

    def commit_restore(self) -> None:
        """Serve alone; pipelined requests come home one after the other."""
        if self._restore is not None:
            self._restore.commit()

    def _pump_restore(self, restore: LeaderRestore) -> None:
        for request in self._shrink_requests:
            if request.epoch == restore.epoch:
                restore.note(request)
        self._shrink_requests = [r for r in self._shrink_requests if r.epoch > restore.epoch]
        restore.pump()
        if restore.is_committed:
            restore.call_home(_MAX_EXCHANGES)

    def _send_give_back(self, message: GiveBack) -> None:
        self._flush_releases()
        self.peers.send_next(FrameKind.GIVE_BACK, message)

    def _dissolve(self) -> None:
        """No request is left on the pipeline."""
        self._flush_releases()
        self.peers.send_next(FrameKind.DISSOLVE, Dissolve())
        for worker_id in self.peers.followers:
            self._scheduler.blocks.forget_worker(worker_id)
        self.is_over = True
        self._emit(Dissolved(self.peers.key))

    # --- batches ---------------------------------------------------------------------------------

    def submit(self, output: SchedulerOutput) -> None:
        """Compute a batch's first layers and send it on; its outcome comes as a Tokens frame."""
        slices, rows = sequence_slices(output), sampling_rows(output)
        batch = make_batch(slices, self._runner.block_size)
        hidden = self._runner.forward(batch, self._runner.embed(batch), self.peers.span)
        message = microbatch(output, slices, rows)
        self._flush_releases()  # first: what this batch takes may be what they free
        self._in_flight[output.step] = output
        self.peers.send_next(FrameKind.MICROBATCH, message, (as_buffer(hidden),))
        if not self._was_idle:
            self._timer.over(Phase.FIRST_BATCH)

    def _outcome(self, message: Tokens) -> BatchOutcome:
        if not self._was_idle:
            self._timer.over(Phase.FIRST_TOKEN)
        sampled = map(SampledToken, message.token_ids, message.logprobs)
        return BatchOutcome(self._in_flight.pop(message.step), tuple(sampled), message.error)

    def _flush_releases(self) -> None:
        """Tell the stages whose blocks they shall free."""
        releases = self._scheduler.blocks.releases
        released = releases.pending()
        if released:
            self.peers.send_next(FrameKind.RELEASE, Release(keys=dict(released)))
            releases.confirm(released)  # whatever follows, follows it down the chain

    # --- requests that join ----------------------------------------------------------------------

    def _take_over(self, message: HandOver, now: float) -> None:
        """A follower's requests and its blocks are the leader's now."""
        adopted = tuple(each for each in message.requests if self._adopt(each, now))
        self._scheduler.blocks.add_capacity(message.worker_id, message.num_blocks)
        self._awaited.discard(message.worker_id)
        self._emit(Adopted(adopted))
        self._log.info("requests taken over", worker=message.worker_id, requests=len(adopted))

    def _adopt(self, message: RequestMessage, now: float) -> bool:
        request = unpack_request(message, now)
        try:
            self._scheduler.relocation.adopt(request, self.peers.route)
        except RelocationError as error:
            self._log.error("request not taken over", reason=str(error))
            keys: tuple[KvKey, ...] = (request.kv_key,)
            homes = {stage.worker_id: keys for stage in message.origin}
            self.peers.send_next(FrameKind.RELEASE, Release(keys=homes))
            blocks = self._scheduler.blocks
            for worker_id in homes:
                blocks.add_capacity(worker_id, blocks.blocks_for(request.num_computed_tokens))
            return False
        return True

    # --- KV that travels -------------------------------------------------------------------------

    def _start_exchanges(self) -> None:
        relocation = self._scheduler.relocation
        for exchange in relocation.start_exchanges(_MAX_EXCHANGES):
            if exchange.transfers:
                self._order(exchange.request, exchange.transfers)
        if not relocation.is_settled or self.is_over:
            return
        if not self._is_settled:
            self._settle()
        elif self._restore is not None and self._restore.is_committed:
            self._dissolve()

    def _filled(self, message: Filled) -> None:
        """Another stage has all KV of a request, or cannot have it."""
        if not message.error:
            self._scheduler.relocation.filled(message.key, message.worker_id)
            return
        request = self._exchanging(message.key)
        if request is not None:
            self._log.error("KV did not travel", request=request.request_id, reason=message.error)
            self._scheduler.relocation.give_up(request)

    def _settle(self) -> None:
        """No KV of layers given up is needed any more: use its memory, here and down the chain."""
        self._is_settled = True
        self.peers.send_next(FrameKind.SETTLE, Settle())
        self._scheduler.blocks.grow(self._runner.settle())
        self._timer.over(Phase.EXCHANGE, self._courier.num_bytes)
        self._emit(Settled(self.peers.key, model_facts(self._runner)))

    def _order(self, request: Request, transfers: tuple[Transfer, ...]) -> None:
        self._num_orders += 1
        order = Order(
            serial=self._num_orders,
            key=request.kv_key,
            num_tokens=request.num_computed_tokens,
            transfers=transfers,
        )
        self._flush_releases()  # first: what this order takes may be what they free
        self.peers.send_next(FrameKind.ORDER, order)
        self._note_filled(self._courier.obey(order))

    def _note_filled(self, keys: Sequence[KvKey]) -> None:
        for key in keys:
            self._scheduler.relocation.filled(key, self.peers.worker_id)

    def _table(self, key: KvKey) -> Sequence[int] | None:
        request = self._exchanging(key)
        return None if request is None else request.block_table

    def _exchanging(self, key: KvKey) -> Request | None:
        request = self._scheduler.requests.get(RequestKey(key.request_id, key.attempt))
        if request is None or request.kv_key != key:
            return None
        return request if request.status is RequestStatus.EXCHANGING else None
