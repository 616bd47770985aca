"""Limits of the scheduler: fixed when the engine starts, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from shared.errors import ConfigError


class ChunkPolicy(StrEnum):
    """How much of the queued prefill one microbatch of a pipeline takes."""

    LOOKAHEAD = "lookahead"  # equal parts of all that is queued
    PREDICTED_TIME = "predicted-time"  # as long as a full batch of a new prompt takes
    TOKEN_COUNT = "token-count"  # `max_num_batched_tokens`, whatever they cost: only for comparison


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What the scheduler may do (vLLM's names where the thing is the same).

    Attributes:
        max_num_batched_tokens: tokens one batch computes at most.
        max_num_seqs: running requests at most, per stage of their route; no more than
            `max_num_batched_tokens`, so that requests that decode never keep a running prefill from
            its next token.
        max_model_len: prompt plus output tokens of a request at most; the KV pool must hold one
            such request, so that whatever is accepted can finish.
        max_num_waiting_requests, max_num_waiting_tokens: bounds of the waiting queue. Preempted
            requests were accepted before and do not count.
        watermark: share of the pool that must stay free when a request is admitted, so that running
            requests have room to grow.
        recovery_watermark: the same for the return of a preempted request, where it is larger, so
            that it is not preempted again at once.
        chunk_policy: how prefill is cut on a pipeline; one worker alone cuts by token count.
        min_prefill_tokens: on a pipeline, batches have at least this many tokens of prefill on
            average, if so many are queued; fewer would not use the device well.
        overlaps: on a route of one stage, make a batch while the one before it is computed.
        exchange_prefill_tokens: while KV travels, batches have no more prefill than a new prompt of
            so many tokens costs. On a device that computes nothing else meanwhile, bytes move
            between batches only, and requests wait for them. None: no such limit.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    max_num_waiting_requests: int = 2048
    max_num_waiting_tokens: int = 1 << 20
    watermark: float = 0.05
    recovery_watermark: float = 0.1
    chunk_policy: ChunkPolicy = ChunkPolicy.LOOKAHEAD
    min_prefill_tokens: int = 64
    overlaps: bool = False
    exchange_prefill_tokens: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for limits under which requests could not make progress."""
        if self.max_num_seqs < 1 or self.max_model_len < 2:
            raise ConfigError(
                f"max_num_seqs ({self.max_num_seqs}) must be at least 1 and max_model_len"
                f" ({self.max_model_len}) at least 2"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must not be less than"
                f" max_num_seqs ({self.max_num_seqs})"
            )
        if self.min_prefill_tokens < 1 or (self.exchange_prefill_tokens or 1) < 1:
            raise ConfigError(
                f"min_prefill_tokens ({self.min_prefill_tokens}) and exchange_prefill_tokens"
                f" ({self.exchange_prefill_tokens}) must be at least 1"
            )
        if not (0.0 <= self.watermark < 1.0 and 0.0 <= self.recovery_watermark < 1.0):
            raise ConfigError(
                f"watermark ({self.watermark}) and recovery_watermark"
                f" ({self.recovery_watermark}) must be in [0, 1)"
            )

    def watermark_blocks(self, num_blocks: int) -> int:
        """Blocks to leave free when a new request is admitted."""
        return math.ceil(self.watermark * num_blocks)

    def recovery_watermark_blocks(self, num_blocks: int) -> int:
        """Blocks to leave free when a preempted request resumes."""
        return math.ceil(max(self.watermark, self.recovery_watermark) * num_blocks)
