"""The aiohttp application: routes, middlewares, limits."""

from __future__ import annotations

from aiohttp import web

from services.router.api.chat import ChatApi
from services.router.api.completions import CompletionsApi
from services.router.api.context import ApiContext
from services.router.api.middleware import add_request_id, frame_requests, require_keys
from services.router.api.openapi import openapi_document
from services.router.api.operations import OperationsApi
from services.router.api.text import TextApi


def create_app(
    context: ApiContext, *, api_key: str | None, admin_key: str | None, max_body_bytes: int
) -> web.Application:
    """The router's HTTP side."""
    app = web.Application(
        client_max_size=max_body_bytes,
        middlewares=[frame_requests(context.metrics), require_keys(api_key, admin_key)],
    )
    app.on_response_prepare.append(add_request_id)
    chat, completions = ChatApi(context), CompletionsApi(context)
    text, operations = TextApi(context), OperationsApi(context)
    document = openapi_document()

    async def openapi(request: web.Request) -> web.Response:
        return web.json_response(document)

    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.create),
            web.post("/v1/completions", completions.create),
            web.get("/v1/models", text.list_models),
            web.get("/v1/models/{model:.+}", text.get_model),
            web.post("/tokenize", text.tokenize),
            web.post("/detokenize", text.detokenize),
            web.get("/live", operations.live),
            web.get("/health", operations.health),
            web.get("/ready", operations.health),
            web.get("/ping", operations.health),
            web.get("/metrics", operations.metrics),
            web.get("/version", operations.version),
            web.get("/load", operations.load),
            web.get("/cluster", operations.cluster),
            web.get("/openapi.json", openapi),
            web.post("/admin/drain", operations.drain),
            web.post("/admin/drop", operations.drop),
            web.post("/admin/restore", operations.restore),
        ]
    )
    return app
