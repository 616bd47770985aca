"""A stage behind the leader: computes what it is sent, and keeps KV by key.

It knows no requests. Everything about its blocks is decided by the leader, which counts them; the
ids are its own. Runs in the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from services.worker.engine.request import KvKey
from services.worker.engine.scheduler import Scheduler
from services.worker.facts import model_facts
from services.worker.links.base import Buffer, LinkFrame
from services.worker.model.batch import SequenceSlice, make_batch
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.events import Dissolved, EventSink, HandedOver, Phase, Settled
from services.worker.pipeline.kv_courier import KvCourier
from services.worker.pipeline.kv_transfer import as_buffer, float_tensor
from services.worker.pipeline.messages import (
    Capacity,
    Dissolve,
    Filled,
    FrameKind,
    GiveBack,
    KvPart,
    Microbatch,
    Order,
    Release,
    Settle,
    ShrinkRequest,
    Tokens,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.phase_timer import PhaseTimer
from services.worker.pipeline.restoration import Restoration, RestorationState
from services.worker.pipeline.rows import sampling_row
from shared.layout import Span
from shared.messages import unpack_token_ids


class FollowerStage:
    """A worker that another one leads, from its commit on."""

    def __init__(
        self, peers: GroupPeers, runner: ModelRunner, scheduler: Scheduler, emit: EventSink
    ) -> None:
        """Take a worker's scheduler, which has no requests after `begin`."""
        self.peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._blocks = scheduler.blocks.stage
        self._emit = emit
        self._timer = PhaseTimer(emit)
        self._courier = KvCourier(peers, runner, self._table)
        self._restoration: Restoration | None = None
        self._is_alone = False
        self._is_dissolved = False
        self._log = structlog.get_logger(component="stage", group=peers.key.group_id)

    def begin(self) -> None:
        """Give layers up and all requests away; no batch may be in flight."""
        requests = self._scheduler.relocation.hand_over_all()
        num_blocks = self._lend_all(self._runner.keep(self.peers.span))
        self._emit(HandedOver(self.peers, tuple(requests), num_blocks))

    def release_unwanted(self, keys: Sequence[KvKey]) -> None:
        """Nobody wants requests any more that were to be handed over; the leader has their room."""
        num_blocks = 0
        for key in keys:
            num_blocks += len(self._table(key) or ())
            self._blocks.release(key)
        self._send_capacity(num_blocks)

    def handle(self, frame: LinkFrame, now: float) -> None:
        """Act on a frame from the leader, from the stage before, or with KV.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of another kind.
        """
        match frame.kind:
            case FrameKind.MICROBATCH:
                self._run(Microbatch.decode(frame.header), frame.buffers[0])
            case FrameKind.RELEASE:
                self._release(Release.decode(frame.header))
            case FrameKind.ORDER:
                self._obey(Order.decode(frame.header))
            case FrameKind.KV_PART:
                part = KvPart.decode(frame.header)
                self._tell_filled(self._courier.take(part, frame.buffers[0]))
            case FrameKind.SETTLE:
                self._settle(Settle.decode(frame.header))
            case FrameKind.GIVE_BACK:
                self._take_back(GiveBack.decode(frame.header))
            case FrameKind.DISSOLVE:
                self._dissolve(Dissolve.decode(frame.header))
            case _:
                raise ValueError(f"a follower has no use for a frame of kind {frame.kind}")

    def pump(self) -> None:
        """Load a part of the model, if that is due; send KV that waited for room on its link."""
        if self._restoration is not None:
            self._restoration.pump()
        self.peers.push_bulk()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        is_loading = self._restoration is not None and self._restoration.is_busy
        return self.peers.has_backlog or is_loading

    @property
    def is_over(self) -> bool:
        """True when this worker serves alone and nobody needs its part of the pipeline."""
        return self._is_dissolved and self._is_alone

    # --- restore ---------------------------------------------------------------------------------

    def prepare_restore(self, epoch: int) -> None:
        """Get the missing layers back while the pipeline serves."""
        whole = Span(start=0, end=self._runner.config.num_layers)
        self._restoration = Restoration(self.peers, self._runner, self._emit, epoch, whole)
        request = ShrinkRequest(
            worker_id=self.peers.worker_id, epoch=epoch, num_blocks=self._runner.replica_blocks
        )
        self.peers.send(self.peers.leader, FrameKind.SHRINK_REQUEST, request)

    def undo_restore(self) -> None:
        """The pipeline stays."""
        if self._restoration is not None:
            self._send_capacity(self._lend_all(self._restoration.undo()))
            self._restoration = None

    def commit_restore(self) -> None:
        """Serve new requests alone; those on the pipeline go on until they have left."""
        self._runner.serve_all()
        self._is_alone = True
        self._end_if_over()

    def _take_back(self, message: GiveBack) -> None:
        """The leader books less here from now on: for a restore, or for own requests."""
        self.peers.send_next(FrameKind.GIVE_BACK, message)
        self._blocks.take_back(message.num_blocks.get(self.peers.worker_id, 0))
        if self._restoration is None:  # called off here: the leader shall have it again
            self._send_capacity(self._lend_all(self._runner.num_blocks))
        elif self._restoration.state is RestorationState.SHRINKING:
            self._restoration.shrunk(self._scheduler.blocks.shrink(0, ()))

    def _dissolve(self, message: Dissolve) -> None:
        self.peers.send_next(FrameKind.DISSOLVE, message)
        self._is_dissolved = True
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self.is_over:
            self._blocks.release_all()
            self._emit(Dissolved(self.peers.key))

    # --- batches ---------------------------------------------------------------------------------

    def _run(self, message: Microbatch, buffer: Buffer) -> None:
        """Compute a microbatch and pass it on, or answer with its tokens."""
        try:
            self._compute(message, buffer)
        except Exception as error:  # whatever it is, it must not take the other requests along
            self._log.exception("batch failed", requests=len(message.keys))
            self._answer(Tokens(step=message.step, error=f"{self.peers.worker_id}: {error}"))

    def _compute(self, message: Microbatch, buffer: Buffer) -> None:
        batch = make_batch(self._slices(message), self._runner.block_size)
        hidden = float_tensor(buffer).view(batch.token_ids.numel(), -1)
        self._runner.forward(batch, hidden, self.peers.span)
        if self.peers.next_worker_id is not None:
            self.peers.send_next(FrameKind.MICROBATCH, message, (as_buffer(hidden),))
            return
        sampled = self._runner.sample(hidden, batch, [sampling_row(row) for row in message.rows])
        self._answer(
            Tokens(
                step=message.step,
                token_ids=tuple(token.token_id for token in sampled),
                logprobs=tuple(token.logprobs for token in sampled),
            )
        )

    def _slices(self, message: Microbatch) -> list[SequenceSlice]:
        token_ids = unpack_token_ids(message.token_ids)
        slices, position = [], 0
        for key, start, length, wants_token in zip(
            message.keys, message.starts, message.lengths, message.wants_token, strict=True
        ):
            block_table = self._blocks.extend(key, start + length)
            tokens = token_ids[position : position + length]
            slices.append(SequenceSlice(tokens, start, block_table, wants_token))
            position += length
        return slices

    def _answer(self, tokens: Tokens) -> None:
        self.peers.send(self.peers.leader, FrameKind.TOKENS, tokens)

    # --- KV --------------------------------------------------------------------------------------

    def _release(self, message: Release) -> None:
        self.peers.send_next(FrameKind.RELEASE, message)
        for key in message.keys.get(self.peers.worker_id, ()):
            self._blocks.release(key)

    def _obey(self, order: Order) -> None:
        """Make room for KV that will come, and send what others need."""
        self.peers.send_next(FrameKind.ORDER, order)
        here = self.peers.worker_id
        try:
            if any(transfer.destination == here for transfer in order.transfers):
                self._blocks.extend(order.key, order.num_tokens)
            self._tell_filled(self._courier.obey(order))
        except Exception as error:  # one request's misfortune
            self._log.exception("KV cannot travel", request=order.key.request_id)
            self._send_filled(Filled(key=order.key, worker_id=here, error=str(error)))

    def _table(self, key: KvKey) -> Sequence[int] | None:
        try:
            return self._blocks.block_table(key)
        except KeyError:
            return None

    def _tell_filled(self, keys: Sequence[KvKey]) -> None:
        for key in keys:
            self._send_filled(Filled(key=key, worker_id=self.peers.worker_id))

    def _send_filled(self, filled: Filled) -> None:
        self.peers.send(self.peers.leader, FrameKind.FILLED, filled)

    # --- size ------------------------------------------------------------------------------------

    def _settle(self, message: Settle) -> None:
        """No KV of layers given up is needed any more: let the leader use its memory."""
        self.peers.send_next(FrameKind.SETTLE, message)
        self._send_capacity(self._lend_all(self._runner.settle()))
        self._timer.over(Phase.EXCHANGE, self._courier.num_bytes)
        self._emit(Settled(self.peers.key, model_facts(self._runner)))

    def _lend_all(self, num_blocks: int) -> int:
        """Let the leader book whatever is free in a pool of now `num_blocks` blocks."""
        blocks = self._scheduler.blocks
        blocks.grow(num_blocks)
        num_lent = blocks.num_free(self.peers.worker_id)
        self._blocks.lend(num_lent)
        return num_lent

    def _send_capacity(self, num_blocks: int) -> None:
        capacity = Capacity(worker_id=self.peers.worker_id, num_blocks=num_blocks)
        self.peers.send(self.peers.leader, FrameKind.CAPACITY, capacity)
