"""From a request's fields to the worker's sampling parameters; pure."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from services.router.api.schemas import GenerationRequest
from services.router.errors import BadRequestError
from shared.sampling import SamplingParams
from shared.wire import first_problem

_DEFAULTED = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}


def resolve_max_tokens(
    num_prompt_tokens: int, asked: int | None, default: int | None, limit: int
) -> int:
    """Output tokens of a request.

    Args:
        asked: the request's own figure.
        default: where it has none; None stands for all the room there is.
        limit: prompt and output tokens that fit model and KV cache.

    Raises:
        BadRequestError: prompt or output do not fit.
    """
    room = limit - num_prompt_tokens
    if room < 1:
        raise BadRequestError(
            f"the prompt has {num_prompt_tokens} tokens, but prompt and output together may have"
            f" at most {limit}",
            param="prompt",
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise BadRequestError(
            f"the prompt has {num_prompt_tokens} tokens and {asked} more were asked for, but"
            f" together they may be at most {limit}",
            param="max_tokens",
        )
    return asked


def build_sampling(
    body: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None,
    defaults: Mapping[str, float],
    vocab_size: int,
) -> SamplingParams:
    """The parameters of `body`; what it leaves out comes from `defaults`, then OpenAI's.

    A seed is drawn where none is given, so that a replay draws the same tokens.
    """
    values: dict[str, Any] = {
        **{name: value for name, value in defaults.items() if name in _DEFAULTED},
        **body.model_dump(include=_DEFAULTED, exclude_none=True),
    }
    if values.get("top_k") == -1:
        values["top_k"] = 0
    bias = {int(token_id): value for token_id, value in body.logit_bias.items()}
    _check_ids("logit_bias", bias, vocab_size)
    _check_ids("stop_token_ids", body.stop_token_ids, vocab_size)
    if body.min_tokens > max_tokens:
        raise BadRequestError(
            f"min_tokens is {body.min_tokens}, more than the {max_tokens} tokens of the output",
            param="min_tokens",
        )
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            seed=secrets.randbits(63) if body.seed is None else body.seed & (2**63 - 1),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=bias,
            ignore_eos=body.ignore_eos,
            stop_token_ids=tuple(body.stop_token_ids),
            logprobs=logprobs,
            **values,
        )
    except ValidationError as error:
        raise BadRequestError(first_problem(error)) from error


def _check_ids(param: str, token_ids: Any, vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise BadRequestError(
                f"{param}: {token_id} is no token id, they are in [0, {vocab_size})", param=param
            )
