"""What the scheduler hands out: batches to run, tokens to send, answers to give, its load."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.worker.engine.releases import ReleasedKeys
from services.worker.engine.request import Request
from services.worker.engine.routes import REPLICA, Route
from shared.messages import FinishReason, GenerateStatus


class ScheduledRequest(NamedTuple):
    """Compute the tokens `[num_computed_tokens, num_computed_tokens + num_scheduled_tokens)`.

    Those before are computed when its turn comes, by a batch in flight if need be.
    """

    request: Request
    num_computed_tokens: int
    num_scheduled_tokens: int
    wants_token: bool  # its last token is among them, so the next one is sampled


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One batch. Decoding requests come first, then prefill chunks, each oldest first.

    Attributes:
        step: counts the non-empty batches of this scheduler; 0 for an empty one.
        preempted: requests that lost their blocks while this batch was made.
        route: the stages that compute it.
        released: keys that its stages free before they compute it.
    """

    step: int
    scheduled: tuple[ScheduledRequest, ...]
    preempted: tuple[Request, ...] = ()
    route: Route = REPLICA
    released: ReleasedKeys = field(default_factory=dict)

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens the batch computes."""
        return sum(item.num_scheduled_tokens for item in self.scheduled)

    @property
    def sampled_requests(self) -> list[Request]:
        """Those that get a new token, in the order in which their tokens must be returned."""
        return [item.request for item in self.scheduled if item.wants_token]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought a request: a token, its end, or both.

    Attributes:
        index: position of the first of `new_token_ids` among the request's output tokens.
        stop_token_id: the end-of-sequence or stop token that ended it; it is also the last of
            `new_token_ids`.
        error: for `FinishReason.ERROR`, a sentence for the client.
    """

    request: Request
    index: int
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""


class AddResult(NamedTuple):
    """Whether a request was taken; `detail` is a sentence for the client where it was not."""

    status: GenerateStatus
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """The engine's part of a LoadReport; field names are those of the message.

    Of a pipeline, blocks are those of the stage that has the fewest free. Requests whose KV travels
    count as running.
    """

    kv_blocks_total: int
    kv_blocks_used: int
    requests_running: int
    requests_waiting: int
    waiting_blocks: int
    num_preemptions: int
    engine_steps: int
