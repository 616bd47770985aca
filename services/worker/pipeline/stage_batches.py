"""Microbatches on a stage behind the leader: computed and passed on, or answered with tokens.

What a batch needs to know of its requests travels with it; their blocks are found by key. Its
hidden states are computed where the stage before has put them.

The last stage does not wait for a device that computes by itself: it takes the next batch, and
answers when the tokens of one before are there.
"""

from __future__ import annotations

from collections import deque

import structlog
import torch

from services.worker.channels.base import Packed
from services.worker.engine.stage_blocks import StageBlocks
from services.worker.links.base import LinkDownError
from services.worker.model.batch import SequenceSlice
from services.worker.model.pending import PendingTokens
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.messages import FrameKind, Microbatch, Tokens
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.rows import sampling_row
from shared.messages import unpack_token_ids


class StageBatches:
    """The computing part of one stage."""

    def __init__(self, peers: GroupPeers, runner: ModelRunner, blocks: StageBlocks) -> None:
        self._peers = peers
        self._runner = runner
        self._blocks = blocks
        self._pending: deque[tuple[Microbatch, PendingTokens]] = deque()  # oldest first
        self._log = structlog.get_logger(component="stage", group=peers.key.group_id)

    def run(self, message: Microbatch, packed: Packed) -> None:
        """Have a microbatch computed and pass it on, or answer with its tokens."""
        self._runner.meter.batch_arrived(follows=message.follows)
        try:
            with self._peers.received(self._peers.previous_worker_id, packed) as received:
                self._compute(message, received)
        except LinkDownError:
            return  # the group is about to break: nobody waits for an answer
        except Exception as error:  # whatever it is, it must not take the other requests along
            self._fail(message, error)
        self.answer()

    def answer(self) -> None:
        """Send the tokens that have been computed, in the order of their batches."""
        while self._pending and self._pending[0][1].is_ready:
            message, tokens = self._pending.popleft()
            try:
                self._send_tokens(message, tokens)
            except Exception as error:  # as above
                self._fail(message, error)

    @property
    def owes_answers(self) -> bool:
        """True while tokens are being computed."""
        return bool(self._pending)

    def _compute(self, message: Microbatch, received: torch.Tensor) -> None:  # [nbytes] uint8
        batch = self._runner.make_batch(self._slices(message))
        hidden = received.view(self._runner.dtype).view(batch.token_ids.numel(), -1)
        self._runner.forward(batch, hidden, self._peers.span)
        if self._peers.next_worker_id is not None:
            self._peers.send_next(FrameKind.MICROBATCH, message, hidden)
            return
        rows = [sampling_row(row) for row in message.rows]
        self._pending.append((message, self._runner.sample(hidden, batch, rows)))

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

    def _send_tokens(self, message: Microbatch, pending: PendingTokens) -> None:
        sampled = pending.result()
        self._send(
            Tokens(
                step=message.step,
                token_ids=tuple(token.token_id for token in sampled),
                logprobs=tuple(token.logprobs for token in sampled),
            )
        )

    def _fail(self, message: Microbatch, error: Exception) -> None:
        self._log.exception("batch failed", requests=len(message.keys))
        self._send(Tokens(step=message.step, error=f"{self._peers.worker_id}: {error}"))

    def _send(self, tokens: Tokens) -> None:
        """Tell the leader, unless a member is gone: its part of the batch may be garbage."""
        if self._peers.is_connected:
            self._peers.send(self._peers.leader, FrameKind.TOKENS, tokens)
