"""Whether a worker takes a request, decided at once and without asking the engine.

The router waits for this answer, and an engine step may take long; so it is a pure function of
figures that the event loop has: the limits of the model and the pool, and what is open now.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.messages import GenerateReply, GenerateStatus


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What this worker can hold.

    Attributes:
        max_model_len: prompt plus output tokens of one request at most.
        vocab_size: token ids are below it.
        max_num_requests: accepted and unfinished requests at most.
    """

    max_model_len: int
    vocab_size: int
    max_num_requests: int


ACCEPTED = GenerateReply(status=GenerateStatus.ACCEPTED)


def admit(
    limits: AdmissionLimits, token_ids: list[int], num_open: int, *, is_draining: bool
) -> GenerateReply:
    """Decide about a request of these prompt and already generated tokens.

    Args:
        num_open: requests accepted before and not finished.
    """
    if is_draining:
        return GenerateReply(status=GenerateStatus.DRAINING, detail="the worker is shutting down")
    if not token_ids:
        return GenerateReply(status=GenerateStatus.INVALID, detail="the prompt has no tokens")
    if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
        return GenerateReply(
            status=GenerateStatus.INVALID,
            detail=f"the prompt has a token id outside [0, {limits.vocab_size})",
        )
    if len(token_ids) >= limits.max_model_len:
        return GenerateReply(
            status=GenerateStatus.TOO_LONG,
            detail=f"the prompt has {len(token_ids)} tokens; with at least one token of output"
            f" this worker holds {limits.max_model_len}",
        )
    if num_open >= limits.max_num_requests:
        return GenerateReply(
            status=GenerateStatus.OVERLOADED,
            detail=f"the worker already has {num_open} requests",
        )
    return ACCEPTED
