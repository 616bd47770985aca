"""From a validated body and its prompt to a run: limits, sampling, output options."""

from __future__ import annotations

import re
import uuid

from aiohttp import web

from services.router.api.context import ApiContext
from services.router.api.generation import OutputRun
from services.router.api.output import OutputOptions
from services.router.api.sampling import build_sampling, resolve_max_tokens
from services.router.api.schemas import GenerationRequest
from services.router.errors import BadRequestError, UnavailableError
from services.router.metrics import Rejection
from services.router.session import GenerationInput

REQUEST_ID = web.RequestKey("request_id", str)
_CLIENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


def new_request_id(request: web.Request) -> str:
    """The client's `X-Request-Id`, or a fresh one where it gave none that can be used."""
    given = request.headers.get("X-Request-Id", "")
    return given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex


def request_id_of(request: web.Request) -> str:
    """The id that the middleware gave the request."""
    return request[REQUEST_ID]


def check_open(context: ApiContext) -> None:
    """Raise UnavailableError while this router is going down."""
    if context.drain.is_draining:
        context.metrics.reject(Rejection.DRAINING)
        raise UnavailableError("this router is shutting down; send the request again")


async def encode_prompt(
    context: ApiContext, text: str, *, add_special_tokens: bool, param: str
) -> list[int]:
    """Token ids of a prompt; refuses one that cannot fit before tokenising all of it."""
    fewest, limit = context.tokenizer.fewest_tokens(text), context.longest_request()
    if fewest >= limit:
        raise BadRequestError(
            f"the prompt has at least {fewest} tokens, but prompt and output together may have at"
            f" most {limit}",
            param=param,
        )
    return await context.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def start_run(
    context: ApiContext,
    request: web.Request,
    body: GenerationRequest,
    prompt_token_ids: list[int],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> OutputRun:
    """Open a run; the caller must close it. Raises BadRequestError before anything is opened."""
    if not prompt_token_ids:
        raise BadRequestError("the prompt is empty", param="prompt")
    room = resolve_max_tokens(
        len(prompt_token_ids), max_tokens, default_max_tokens, context.longest_request()
    )
    sampling = build_sampling(
        body,
        max_tokens=room,
        logprobs=logprobs,
        defaults=context.model.sampling_defaults,
        vocab_size=context.tokenizer.vocab_size,
    )
    options = OutputOptions(
        stop=tuple(body.stop),
        stop_token_ids=frozenset(body.stop_token_ids),
        min_tokens=body.min_tokens,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )
    generation = GenerationInput(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=sampling,
        eos_token_ids=context.tokenizer.facts.eos_token_ids,
        traceparent=request.headers.get("traceparent", ""),
    )
    return OutputRun(context.generator, generation, options, context.tokenizer, context.metrics)
