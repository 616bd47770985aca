"""When a request ends by itself, and which tokens must not end it yet (vLLM's rules)."""

from __future__ import annotations

from services.worker.engine.request import Request
from shared.messages import FinishReason


def is_stop_token(request: Request, token_id: int) -> bool:
    """True if `token_id` is one that ends this request once `min_tokens` are generated."""
    if token_id in request.sampling.stop_token_ids:
        return True
    return not request.sampling.ignore_eos and token_id in request.eos_token_ids


def finish_reason(request: Request, max_model_len: int) -> FinishReason | None:
    """Why a request whose last token was just appended is finished; None if it is not.

    A stop token counts even where the same token reaches a length limit.
    """
    if (
        request.num_output_tokens > 0
        and request.num_output_tokens >= request.sampling.min_tokens
        and is_stop_token(request, request.output_token_ids[-1])
    ):
        return FinishReason.STOP
    if reaches_limit(request, request.num_tokens, max_model_len):
        return FinishReason.LENGTH
    return None


def reaches_limit(request: Request, num_tokens: int, max_model_len: int) -> bool:
    """True if a request gets no more tokens once it has `num_tokens`, whatever they are."""
    num_output_tokens = num_tokens - request.num_prompt_tokens
    return num_output_tokens >= request.sampling.max_tokens or num_tokens >= max_model_len


def forbidden_token_ids(request: Request, position: int) -> tuple[int, ...]:
    """Tokens the sampler must not draw: those that would stop the request before `min_tokens`.

    Args:
        position: of the token to draw, in prompt and output.
    """
    sampling = request.sampling
    if position - request.num_prompt_tokens >= sampling.min_tokens:
        return ()
    eos_token_ids: frozenset[int] = frozenset() if sampling.ignore_eos else request.eos_token_ids
    return tuple(sorted(eos_token_ids.union(sampling.stop_token_ids)))
