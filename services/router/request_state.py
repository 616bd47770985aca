"""The life of one request in the router, as a state machine over plain data.

    QUEUED -> DISPATCHING -> STREAMING -> FINISHED
       ^          |              |
       |          v              v
       +------- (refused)      LOST          FAILED, CANCELLED: from every state before the end
       +-------------------------+

The stream of one attempt is numbered by token index: what was seen before is dropped, what comes
too early is a gap and is asked for again. A new attempt makes all frames of older ones void.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, StrEnum

from shared.messages import FinishReason, TokenItem


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"  # wants a worker
    DISPATCHING = "dispatching"  # sent to one, not answered yet
    STREAMING = "streaming"  # accepted
    LOST = "lost"  # its worker or its KV is gone; the tokens so far are replayed elsewhere
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDS = frozenset({RequestState.FAILED, RequestState.CANCELLED})
#: Ends of an attempt only; another one goes on.
_ENDS_OF_ATTEMPT = frozenset({FinishReason.ABORT, FinishReason.LOST})
_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: _ENDS | {RequestState.DISPATCHING, RequestState.FINISHED},
    RequestState.DISPATCHING: _ENDS | {RequestState.QUEUED, RequestState.STREAMING},
    RequestState.STREAMING: _ENDS | {RequestState.LOST, RequestState.FINISHED},
    RequestState.LOST: _ENDS | {RequestState.QUEUED, RequestState.FINISHED},
    RequestState.FINISHED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.CANCELLED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """A fault in the router: a request cannot go from this state to that."""


class Verdict(Enum):
    """What a token item is to its stream."""

    NEW = "new"
    DUPLICATE = "duplicate"
    GAP = "gap"
    STALE = "stale"  # of an older attempt, or after the end


class TokenStream:
    """State and tokens of one request; `pending` is what its reader has not taken yet."""

    def __init__(self, now: float) -> None:
        self.state = RequestState.QUEUED
        self.attempt = 0
        self.output_token_ids: list[int] = []
        self.pending: deque[TokenItem] = deque()
        self.has_gap = False
        self.last_heard_at = now
        self._has_last_item = False

    @property
    def is_over(self) -> bool:
        """True in an end state."""
        return not _TRANSITIONS[self.state]

    @property
    def is_live(self) -> bool:
        """True while a worker may be working on the current attempt."""
        return self.state in (RequestState.DISPATCHING, RequestState.STREAMING)

    def move(self, state: RequestState) -> None:
        """Change state; raises IllegalTransitionError."""
        if state not in _TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"request cannot go from {self.state} to {state}")
        self.state = state

    def begin_attempt(self, now: float) -> int:
        """Void all earlier frames; returns the number of the new attempt."""
        self.attempt += 1
        self.has_gap = False
        self.last_heard_at = now
        return self.attempt

    def accept(self, item: TokenItem, now: float) -> Verdict:
        """Take an item in if it is the next one. Overlaps are cut to what is new."""
        if item.attempt != self.attempt or not self.is_live or self._has_last_item:
            return Verdict.STALE
        self.last_heard_at = now
        num_known = len(self.output_token_ids) - item.index
        if num_known < 0:
            self.has_gap = True
            return Verdict.GAP
        if num_known > 0:
            if num_known >= len(item.token_ids) and item.finish_reason is None:
                return Verdict.DUPLICATE
            item = _cut(item, num_known)
        self.has_gap = False
        self.output_token_ids.extend(item.token_ids)
        self.pending.append(item)
        reason = item.finish_reason
        self._has_last_item = reason is not None and reason not in _ENDS_OF_ATTEMPT
        return Verdict.NEW

    def take(self) -> list[TokenItem]:
        """Hand over what is pending."""
        items = list(self.pending)
        self.pending.clear()
        return items


def _cut(item: TokenItem, num_known: int) -> TokenItem:
    """`item` without its first `num_known` tokens."""
    return item.model_copy(
        update={
            "index": item.index + num_known,
            "token_ids": item.token_ids[num_known:],
            "logprobs": None if item.logprobs is None else item.logprobs[num_known:],
        }
    )
