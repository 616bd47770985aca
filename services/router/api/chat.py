"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from services.router.api.answer import Usage, answer
from services.router.api.body import read_body
from services.router.api.context import ApiContext
from services.router.api.logprobs import chat_logprobs
from services.router.api.output import Delta
from services.router.api.schemas import ChatCompletionRequest, ChatMessage
from services.router.api.sse import encode_json, encode_text, event
from services.router.api.start import check_open, encode_prompt, request_id_of, start_run
from services.router.errors import BadRequestError
from services.router.tokenizer import ModelTokenizer


class ChatApi:
    """The endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: web.Request) -> web.StreamResponse:
        context = self._context
        check_open(context)
        body = await read_body(request, ChatCompletionRequest)
        context.model.check(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        prompt = render_chat(context.tokenizer, body)
        token_ids = await encode_prompt(
            context, prompt, add_special_tokens=body.add_special_tokens, param="messages"
        )
        run = start_run(
            context,
            request,
            body,
            token_ids,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            default_max_tokens=None,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        chat_format = ChatFormat(
            f"chatcmpl-{request_id_of(request)}",
            context.model.name,
            context.tokenizer,
            logprobs=body.logprobs,
            prompt_token_ids=token_ids if body.return_token_ids else None,
        )
        return await answer(request, body, [run], chat_format)


def render_chat(tokenizer: ModelTokenizer, body: ChatCompletionRequest) -> str:
    """The prompt of a chat request; raises BadRequestError."""
    explicit = "add_generation_prompt" in body.model_fields_set
    if body.continue_final_message and explicit and body.add_generation_prompt:
        raise BadRequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    return render_messages(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )


def render_messages(
    tokenizer: ModelTokenizer,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: dict[str, Any],
) -> str:
    """`messages` through the model's chat template; raises BadRequestError."""
    if tokenizer.chat_template is None:
        raise BadRequestError("this model has no chat template; use /v1/completions")
    return tokenizer.chat_template.render(
        [message.for_template() for message in messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables=variables,
    )


class ChatFormat:
    """Chat answers; see `AnswerFormat`."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        tokenizer: ModelTokenizer,
        *,
        logprobs: bool,
        prompt_token_ids: list[int] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._prompt_token_ids = prompt_token_ids
        self._created = int(time.time())
        self._id = answer_id
        self._model = model
        self._is_first = True
        # All that is the same in every plain chunk, around the text.
        head = encode_json(self._envelope("chat.completion.chunk"))[:-1]
        self._before_text = f'data: {head},"choices":[{{"index":0,"delta":{{"content":'
        self._after_text = '},"logprobs":null,"finish_reason":null}]}\n\n'

    def chunk(self, index: int, delta: Delta, usage: Usage | None) -> bytes:
        is_plain = (
            not self._is_first
            and delta.finish_reason is None
            and usage is None
            and not self._logprobs
            and self._prompt_token_ids is None
        )
        if is_plain:
            return f"{self._before_text}{encode_text(delta.text)}{self._after_text}".encode()
        return event(self._full_chunk(index, delta, usage))

    def usage_chunk(self, usage: Usage) -> bytes:
        return event(self._envelope("chat.completion.chunk") | {"choices": [], "usage": usage})

    def answer(self, outputs: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        (output,) = outputs
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            **self._details(output),
            "stop_reason": output.stop_reason,
        }
        envelope = self._envelope("chat.completion")
        if self._prompt_token_ids is not None:
            envelope["prompt_token_ids"] = self._prompt_token_ids
        return envelope | {"choices": [choice], "usage": usage}

    def _full_chunk(self, index: int, delta: Delta, usage: Usage | None) -> dict[str, Any]:
        content: dict[str, Any] = {"role": "assistant"} if self._is_first else {}
        content["content"] = delta.text
        choice = {"index": index, "delta": content, **self._details(delta)}
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        chunk = self._envelope("chat.completion.chunk") | {"choices": [choice]}
        if self._is_first and self._prompt_token_ids is not None:
            chunk["prompt_token_ids"] = self._prompt_token_ids
        if usage is not None:
            chunk["usage"] = usage
        self._is_first = False
        return chunk

    def _details(self, delta: Delta) -> dict[str, Any]:
        reason = delta.finish_reason
        details: dict[str, Any] = {
            "logprobs": chat_logprobs(self._tokenizer, delta) if self._logprobs else None,
            "finish_reason": None if reason is None else reason.value,
        }
        if self._prompt_token_ids is not None:
            details["token_ids"] = list(delta.token_ids)
        return details

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
