"""`POST /v1/completions`. Several prompts in one request become several choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from services.router.api.answer import Usage, answer
from services.router.api.body import read_body
from services.router.api.context import ApiContext
from services.router.api.generation import OutputRun
from services.router.api.logprobs import CompletionLogprobs
from services.router.api.output import Delta
from services.router.api.schemas import CompletionRequest
from services.router.api.sse import encode_json, encode_text, event
from services.router.api.start import check_open, encode_prompt, request_id_of, start_run
from services.router.errors import BadRequestError

DEFAULT_MAX_TOKENS = 16


class CompletionsApi:
    """The endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: web.Request) -> web.StreamResponse:
        context = self._context
        check_open(context)
        body = await read_body(request, CompletionRequest)
        context.model.check(body.model)
        if body.echo and body.logprobs is not None:
            raise BadRequestError("echo together with logprobs is not supported", param="echo")
        prompts = body.prompts()
        if len(prompts) > context.max_batch_prompts:
            raise BadRequestError(
                f"{len(prompts)} prompts in one request; at most {context.max_batch_prompts} are"
                " allowed",
                param="prompt",
            )
        encoded = [await self._encode(body, prompt) for prompt in prompts]
        choices = [
            CompletionChoice(
                self._echo(prompt, token_ids) if body.echo else "",
                None if body.logprobs is None else CompletionLogprobs(context.tokenizer),
                token_ids if body.return_token_ids else None,
            )
            for prompt, token_ids in zip(prompts, encoded, strict=True)
        ]
        answer_id = f"cmpl-{request_id_of(request)}"
        runs = await self._start(request, body, encoded)
        return await answer(
            request, body, runs, CompletionFormat(answer_id, context.model.name, choices)
        )

    async def _encode(self, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
        """Token ids of one prompt; raises BadRequestError for ids the model does not have."""
        if isinstance(prompt, str):
            return await encode_prompt(
                self._context, prompt, add_special_tokens=body.add_special_tokens, param="prompt"
            )
        size = self._context.tokenizer.vocab_size
        if prompt and not 0 <= min(prompt) <= max(prompt) < size:
            raise BadRequestError(f"prompt: token ids must be in [0, {size})", param="prompt")
        return prompt

    def _echo(self, prompt: str | list[int], token_ids: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return self._context.tokenizer.decode(token_ids, skip_special_tokens=False)

    async def _start(
        self, request: web.Request, body: CompletionRequest, encoded: list[list[int]]
    ) -> list[OutputRun]:
        """All runs, or none."""
        runs: list[OutputRun] = []
        try:
            for token_ids in encoded:
                run = start_run(
                    self._context,
                    request,
                    body,
                    token_ids,
                    max_tokens=body.max_tokens,
                    default_max_tokens=DEFAULT_MAX_TOKENS,
                    logprobs=body.logprobs,
                )
                runs.append(run)
        except BaseException:
            for run in runs:
                await run.close()
            raise
        return runs


class CompletionChoice:
    """What one choice needs while it is written."""

    def __init__(
        self, echo: str, logprobs: CompletionLogprobs | None, prompt_token_ids: list[int] | None
    ) -> None:
        self.echo = echo
        self.logprobs = logprobs
        self.prompt_token_ids = prompt_token_ids
        self.is_first = True


class CompletionFormat:
    """Completion answers; see `AnswerFormat`."""

    def __init__(self, answer_id: str, model: str, choices: Sequence[CompletionChoice]) -> None:
        self._envelope: dict[str, Any] = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = choices
        self._is_plain = all(
            choice.logprobs is None and choice.prompt_token_ids is None and not choice.echo
            for choice in choices
        )
        # All that is the same in every plain chunk, around the choice's index and the text.
        self._head = f'data: {encode_json(self._envelope)[:-1]},"choices":[{{"index":'
        self._tail = ',"logprobs":null,"finish_reason":null}]}\n\n'

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> bytes:
        if self._is_plain and delta.finish_reason is None and usage is None:
            text = encode_text(delta.text)
            return f'{self._head}{index},"text":{text}{self._tail}'.encode()
        chunk = self._envelope | {"choices": [self._choice(index, delta)]}
        if usage is not None:
            chunk["usage"] = usage
        return event(chunk)

    def usage_chunk(self, usage: Usage) -> bytes:
        return event(self._envelope | {"choices": [], "usage": usage})

    def answer(self, outputs: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self._envelope | {"choices": choices, "usage": usage}

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        state = self._choices[index]
        text = state.echo + delta.text if state.is_first else delta.text
        reason = delta.finish_reason
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if state.logprobs is None else state.logprobs.of(delta),
            "finish_reason": None if reason is None else reason.value,
        }
        if reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if state.prompt_token_ids is not None:
            choice["token_ids"] = list(delta.token_ids)
            if state.is_first:
                choice["prompt_token_ids"] = state.prompt_token_ids
        state.is_first = False
        return choice
