"""Whether a new request is taken: the checks of `Scheduler.add`, cheapest first."""

from __future__ import annotations

from enum import Enum, auto

from services.worker.engine.config import SchedulerConfig
from services.worker.engine.outputs import AddResult
from services.worker.engine.request import Request
from services.worker.engine.request_queue import RequestQueue
from services.worker.engine.stopping import finish_reason
from shared.messages import GenerateStatus


class IntakeState(Enum):
    """Whether requests are taken at all."""

    OPEN = auto()
    DRAINING = auto()  # accepted requests are finished, new ones refused; there is no way back


def check_request(
    request: Request, state: IntakeState, config: SchedulerConfig, waiting: RequestQueue
) -> AddResult:
    """ACCEPTED, or why `request` cannot join `waiting`."""
    if state is IntakeState.DRAINING:
        return AddResult(GenerateStatus.DRAINING, "the worker is draining")
    if request.num_prompt_tokens == 0:
        return AddResult(GenerateStatus.INVALID, "the prompt has no tokens")
    if request.num_prompt_tokens >= config.max_model_len:
        return AddResult(
            GenerateStatus.TOO_LONG,
            f"the prompt has {request.num_prompt_tokens} tokens, but this worker can serve at most"
            f" {config.max_model_len - 1} and one of output",
        )
    if finish_reason(request, config.max_model_len) is not None:
        return AddResult(GenerateStatus.INVALID, "the request is already complete")
    if _is_full(request, config, waiting):
        return AddResult(
            GenerateStatus.OVERLOADED,
            f"the worker's queue is full ({len(waiting)} requests wait)",
        )
    return AddResult(GenerateStatus.ACCEPTED)


def _is_full(request: Request, config: SchedulerConfig, waiting: RequestQueue) -> bool:
    """True if `request` would exceed a bound of the queue; an empty queue takes any request."""
    if len(waiting) >= config.max_num_waiting_requests:
        return True
    num_tokens = sum(other.num_tokens for other in waiting)
    return num_tokens > 0 and num_tokens + request.num_tokens > config.max_num_waiting_tokens
