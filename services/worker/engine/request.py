"""One request inside the engine: its tokens, its blocks, how far it is computed, its life.

Made by the worker's service from a `GenerateRequest`, moved through its life by the scheduler, read
by the model runner. Everything else about a request is derived from these fields, so that nothing
goes stale when it is preempted or replayed.

                 prompt_token_ids                 output_token_ids
    tokens  | p0 p1 p2 ...              pn | o0 o1 ...  om |
            [0 ......... num_computed_tokens) [.. num_tokens)
              in the KV cache                   still to compute; the last one is sampled from

    block_table   [ b0 | b1 | b2 | ... ]    token i lies in block_table[i // block_size]

Invariant: `0 <= num_computed_tokens <= num_tokens`, and the blocks cover the computed tokens. A
running request that waits for nothing but its next token has `num_computed_tokens + 1 ==
num_tokens`.

Tokens in batches in flight are counted, so that the next batch can be made before they return (see
`overlap.py`). A pending token is one that such a batch samples: it will be there, but nobody here
knows it. Of a request that decodes, with its token t8 in flight:

    tokens  | t0 ............ t7 | t8 | ?? |
            [0 .............. 8)                num_computed_tokens
            [0 ................... 9)           num_tokens, and num_taken_tokens
            [0 ........................ 10)     num_expected_tokens: one is pending, and unscheduled
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from services.worker.engine.routes import Route
from shared.errors import KunserveError
from shared.sampling import SamplingParams


class IllegalTransitionError(KunserveError):
    """A request was sent from one state to another that the life cycle does not know."""


class RequestStatus(Enum):
    """Life of a request; `TRANSITIONS` says what may follow what."""

    WAITING = auto()  # accepted, has no KV
    RUNNING = auto()  # has a seat and its KV; in a batch or ready for the next
    PREEMPTED = auto()  # gave its KV away; recomputes from its tokens when it resumes
    PARKED = auto()  # its KV is complete, but not where its next route needs it; waits for its turn
    EXCHANGING = auto()  # its KV travels; the blocks for it are there on every stage
    ENDING = auto()  # its end is decided, but a batch in flight still writes its blocks
    FINISHED_STOPPED = auto()
    FINISHED_LENGTH = auto()
    FINISHED_ABORTED = auto()
    FINISHED_ERROR = auto()

    @property
    def is_finished(self) -> bool:
        """True in the states that nothing leaves."""
        return not TRANSITIONS[self]


_ENDED_FROM_OUTSIDE = frozenset({RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR})

TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: _ENDED_FROM_OUTSIDE | {RequestStatus.RUNNING},
    RequestStatus.RUNNING: _ENDED_FROM_OUTSIDE
    | {
        RequestStatus.PREEMPTED,
        RequestStatus.PARKED,
        RequestStatus.ENDING,
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH,
    },
    RequestStatus.PREEMPTED: _ENDED_FROM_OUTSIDE | {RequestStatus.RUNNING},
    RequestStatus.PARKED: _ENDED_FROM_OUTSIDE | {RequestStatus.EXCHANGING, RequestStatus.PREEMPTED},
    RequestStatus.EXCHANGING: _ENDED_FROM_OUTSIDE
    | {RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.PARKED},
    RequestStatus.ENDING: _ENDED_FROM_OUTSIDE | {RequestStatus.FINISHED_STOPPED},
    RequestStatus.FINISHED_STOPPED: frozenset(),
    RequestStatus.FINISHED_LENGTH: frozenset(),
    RequestStatus.FINISHED_ABORTED: frozenset(),
    RequestStatus.FINISHED_ERROR: frozenset(),
}


class RequestKey(NamedTuple):
    """Identifies a request on this worker: a replay of the same request is another attempt."""

    request_id: str
    attempt: int


class KvKey(NamedTuple):
    """Identifies the KV of a request in every stage that holds some.

    A request that lost its KV and computes it again has a new `generation`. So an order to free
    the old blocks, or a late piece of the old KV, can never meet the new ones.
    """

    request_id: str
    attempt: int
    generation: int


@dataclass(slots=True, eq=False)
class Request:
    """A request and all of its state; compared by identity.

    Attributes:
        output_token_ids: generated tokens; a replay starts with those the client already has.
        arrival_seconds: when the worker got it, on the clock that `Scheduler.schedule` is given.
        route: the workers that hold its KV; None while it has none. What a parked request waits for
            is its `Exchange`.
        block_table: ids of this worker's blocks in token order; only ever appended to while the
            request runs; empty if no KV of it is here.
        num_computed_tokens: leading tokens whose KV is in the cache. Advances when a batch returns.
        num_scheduled_tokens: tokens of it in batches in flight; 0 when it is in none.
        num_pending_tokens: tokens that batches in flight sample.
        num_preemptions: how often it had to give its KV away.
        last_step: the last batch it was in.
        first_scheduled_seconds: when it first entered a batch.
        outcome: how it ends, once that is decided.
    """

    request_id: str
    router_id: str
    attempt: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_seconds: float
    eos_token_ids: frozenset[int] = frozenset()
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    route: Route | None = None
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_pending_tokens: int = 0
    num_preemptions: int = 0
    last_step: int = 0
    first_scheduled_seconds: float | None = None
    outcome: RequestStatus | None = None

    @property
    def key(self) -> RequestKey:
        """What the scheduler knows it by."""
        return RequestKey(self.request_id, self.attempt)

    @property
    def kv_key(self) -> KvKey:
        """What every stage knows its KV by."""
        return KvKey(self.request_id, self.attempt, self.num_preemptions)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, replayed ones included."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_taken_tokens(self) -> int:
        """Leading tokens that are computed, or will be when all batches in flight have returned."""
        return self.num_computed_tokens + self.num_scheduled_tokens

    @property
    def num_expected_tokens(self) -> int:
        """Prompt and output tokens there will be when all batches in flight have returned."""
        return self.num_tokens + self.num_pending_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens that no batch has taken yet; 1 for a request that decodes."""
        return self.num_expected_tokens - self.num_taken_tokens

    @property
    def is_in_flight(self) -> bool:
        """True while a batch that contains it has been scheduled and has not returned."""
        return self.num_scheduled_tokens > 0

    @property
    def queued_seconds(self) -> float | None:
        """How long it waited for KV and a seat; None before its first batch."""
        if self.first_scheduled_seconds is None:
            return None
        return self.first_scheduled_seconds - self.arrival_seconds

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output as one sequence."""
        split = len(self.prompt_token_ids)
        if start >= split:
            return self.output_token_ids[start - split : end - split]
        if end <= split:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - split]

    def transition(self, status: RequestStatus) -> None:
        """Enter `status`; raises IllegalTransitionError where the table does not allow it."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransitionError(
                f"request {self.request_id} cannot go from {self.status.name} to {status.name}"
            )
        self.status = status
