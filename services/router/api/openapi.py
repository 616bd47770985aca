"""`GET /openapi.json`: made once from the pydantic models of the requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.router.api.operations import package_version
from services.router.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    DrainRequest,
    LayoutRequest,
    TokenizeRequest,
)
from services.router.cluster_view import ClusterView

_POSTS: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("Answer a conversation", ChatCompletionRequest),
    "/v1/completions": ("Continue a text", CompletionRequest),
    "/tokenize": ("Token ids of a text", TokenizeRequest),
    "/detokenize": ("Text of token ids", DetokenizeRequest),
    "/admin/drain": ("Let a worker finish and take no new requests", DrainRequest),
    "/admin/drop": ("Give replicated layers to the KV cache now", LayoutRequest),
    "/admin/restore": ("Make whole replicas of pipelines again now", LayoutRequest),
}
_GETS = {
    "/v1/models": "The served model",
    "/v1/models/{model}": "One model",
    "/health": "200 if a request would succeed now",
    "/live": "200 while the process turns",
    "/ready": "200 if a request would succeed now",
    "/ping": "200 if a request would succeed now",
    "/metrics": "Metrics in Prometheus' format",
    "/version": "The server's version",
    "/load": "Requests in this router",
    "/cluster": "Layout and load of the cluster, past transitions, and the planner's last decision",
}
#: What is said of answers in a model of their own; the others are OpenAI's or one line long.
_ANSWERS: dict[str, type[BaseModel]] = {"/cluster": ClusterView}
_REFERENCE = "#/components/schemas/{model}"


def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 description of the router."""
    _, schemas = models_json_schema(
        [(model, "validation") for _, model in _POSTS.values()]
        + [(model, "serialization") for model in _ANSWERS.values()],
        ref_template=_REFERENCE,
    )
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": _responses(path), **_parameters(path)}}
        for path, summary in _GETS.items()
    }
    for path, (summary, model) in _POSTS.items():
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": _json_content(model.__name__)},
                "responses": _responses(path),
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "KunServe", "version": package_version()},
        "paths": paths,
        "components": {"schemas": schemas["$defs"] | {"Error": _error_schema()}},
    }


def _parameters(path: str) -> dict[str, Any]:
    if "{model}" not in path:
        return {}
    schema = {"type": "string"}
    return {"parameters": [{"name": "model", "in": "path", "required": True, "schema": schema}]}


def _responses(path: str) -> dict[str, Any]:
    ok: dict[str, Any] = {"description": "OK"}
    if path in _ANSWERS:
        ok["content"] = _json_content(_ANSWERS[path].__name__)
    return {"200": ok, "default": {"description": "An error", "content": _json_content("Error")}}


def _json_content(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model)}}}


def _error_schema() -> dict[str, Any]:
    fields = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": "integer"},
    }
    return {
        "type": "object",
        "properties": {"error": {"type": "object", "properties": fields}},
        "required": ["error"],
    }
