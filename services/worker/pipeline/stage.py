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
from services.worker.pipeline.events import EventSink, HandedOver, Settled
from services.worker.pipeline.kv_courier import KvCourier
from services.worker.pipeline.kv_transfer import as_buffer, float_tensor
from services.worker.pipeline.messages import (
    Capacity,
    Filled,
    FrameKind,
    KvPart,
    Microbatch,
    Order,
    Release,
    Settle,
    Tokens,
)
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.rows import sampling_row
from shared.messages import unpack_token_ids


class FollowerStage:
    """A worker that another one leads, from its commit on."""

    def __init__(
        self, peers: GroupPeers, runner: ModelRunner, scheduler: Scheduler, emit: EventSink
    ) -> None:
        """Take a worker's scheduler, which has no requests after `begin`."""
        self._peers = peers
        self._runner = runner
        self._scheduler = scheduler
        self._blocks = scheduler.blocks.stage
        self._emit = emit
        self._courier = KvCourier(peers, runner, self._table)
        self._log = structlog.get_logger(component="stage", group=peers.key.group_id)

    def begin(self) -> None:
        """Give layers up and all requests away; no batch may be in flight."""
        requests = self._scheduler.relocation.hand_over_all()
        num_blocks = self._lend_all(self._runner.keep(self._peers.span))
        self._emit(HandedOver(self._peers, tuple(requests), num_blocks))

    def release_unwanted(self, keys: Sequence[KvKey]) -> None:
        """Nobody wants requests any more that were to be handed over; the leader has their room."""
        num_blocks = 0
        for key in keys:
            num_blocks += len(self._table(key) or ())
            self._blocks.release(key)
        self._send_capacity(num_blocks)

    def handle(self, frame: LinkFrame) -> None:
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
            case _:
                raise ValueError(f"a follower has no use for a frame of kind {frame.kind}")

    def pump(self) -> None:
        """Send KV that waited for room on its link."""
        self._peers.push_bulk()

    # --- batches ---------------------------------------------------------------------------------

    def _run(self, message: Microbatch, buffer: Buffer) -> None:
        """Compute a microbatch and pass it on, or answer with its tokens."""
        try:
            self._compute(message, buffer)
        except Exception as error:  # whatever it is, it must not take the other requests along
            self._log.exception("batch failed", requests=len(message.keys))
            self._answer(Tokens(step=message.step, error=f"{self._peers.worker_id}: {error}"))

    def _compute(self, message: Microbatch, buffer: Buffer) -> None:
        batch = make_batch(self._slices(message), self._runner.block_size)
        hidden = float_tensor(buffer).view(batch.token_ids.numel(), -1)
        self._runner.forward(batch, hidden)
        if self._peers.next_worker_id is not None:
            self._peers.send_next(FrameKind.MICROBATCH, message, (as_buffer(hidden),))
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
        self._peers.send(self._peers.leader, FrameKind.TOKENS, tokens)

    # --- KV --------------------------------------------------------------------------------------

    def _release(self, message: Release) -> None:
        self._peers.send_next(FrameKind.RELEASE, message)
        for key in message.keys.get(self._peers.worker_id, ()):
            self._blocks.release(key)

    def _obey(self, order: Order) -> None:
        """Make room for KV that will come, and send what others need."""
        self._peers.send_next(FrameKind.ORDER, order)
        here = self._peers.worker_id
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
            self._send_filled(Filled(key=key, worker_id=self._peers.worker_id))

    def _send_filled(self, filled: Filled) -> None:
        self._peers.send(self._peers.leader, FrameKind.FILLED, filled)

    # --- size ------------------------------------------------------------------------------------

    def _settle(self, message: Settle) -> None:
        """No KV of layers given up is needed any more: let the leader use its memory."""
        self._peers.send_next(FrameKind.SETTLE, message)
        self._send_capacity(self._lend_all(self._runner.settle()))
        self._emit(Settled(self._peers.key, model_facts(self._runner)))

    def _lend_all(self, num_blocks: int) -> int:
        """Let the leader book whatever is free in a pool of now `num_blocks` blocks."""
        blocks = self._scheduler.blocks
        blocks.grow(num_blocks)
        num_lent = blocks.num_free(self._peers.worker_id)
        self._blocks.lend(num_lent)
        return num_lent

    def _send_capacity(self, num_blocks: int) -> None:
        capacity = Capacity(worker_id=self._peers.worker_id, num_blocks=num_blocks)
        self._peers.send(self._peers.leader, FrameKind.CAPACITY, capacity)
