"""`GET /v1/models`, `POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from services.router.api.body import read_body
from services.router.api.chat import render_messages
from services.router.api.context import ApiContext
from services.router.api.schemas import DetokenizeRequest, TokenizeRequest
from services.router.errors import BadRequestError


class TextApi:
    """Endpoints that need no worker."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def get_model(self, request: web.Request) -> web.Response:
        self._context.model.check(request.match_info["model"])
        return web.json_response(self._card())

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, TokenizeRequest)
        self._context.model.check(body.model)
        text, default_special = self._text(body)
        special = default_special if body.add_special_tokens is None else body.add_special_tokens
        token_ids = await self._context.tokenizer.encode(text, add_special_tokens=special)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self._context.longest_request(),
            "tokens": token_ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [
                self._context.tokenizer.token_bytes(token_id).decode(errors="replace")
                for token_id in token_ids
            ]
        return web.json_response(answer)

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await read_body(request, DetokenizeRequest)
        self._context.model.check(body.model)
        size = self._context.tokenizer.vocab_size
        if any(not 0 <= token_id < size for token_id in body.tokens):
            raise BadRequestError(f"tokens: token ids must be in [0, {size})", param="tokens")
        text = self._context.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return web.json_response({"prompt": text})

    def _text(self, body: TokenizeRequest) -> tuple[str, bool]:
        """The text to tokenise, and whether special tokens are added by default."""
        if (body.prompt is None) == (body.messages is None):
            raise BadRequestError("give either prompt or messages", param="prompt")
        if body.messages is None:
            return body.prompt or "", True
        prompt = render_messages(
            self._context.tokenizer,
            body.messages,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        return prompt, False

    def _card(self) -> dict[str, Any]:
        model = self._context.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created,
            "owned_by": "kunserve",
            "root": model.root,
            "parent": None,
            "max_model_len": model.max_model_len,
        }
