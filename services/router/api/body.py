"""From the bytes of a request to a validated model; every fault is a 400 that names its place."""

from __future__ import annotations

import json
from typing import TypeVar

import structlog
from aiohttp import web
from pydantic import BaseModel, ValidationError

from services.router.api.unsupported import refuse_unsupported
from services.router.errors import BadRequestError, BodyTooLargeError

BodyModel = TypeVar("BodyModel", bound=BaseModel)


async def read_body(request: web.Request, model: type[BodyModel]) -> BodyModel:
    """Read, parse and validate a request's body.

    Raises:
        BadRequestError, BodyTooLargeError: one sentence for the client.
    """
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise BodyTooLargeError(f"the request body is too large: {error.text}") from error
    except web.RequestPayloadError as error:
        raise BadRequestError("the request body is not encoded as its headers say") from error
    return validate_body(parse_object(data), model)


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, without the keys whose value is null."""
    try:
        body = json.loads(data.decode(), parse_constant=_refuse_constant)
        if b"\\u" in data:
            _check_surrogates(body)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the request body is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise BadRequestError("the request body is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadRequestError(
            f"the request body is not valid JSON: {error.msg} (line {error.lineno}, column"
            f" {error.colno})"
        ) from error
    except ValueError as error:
        raise BadRequestError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("the request body must be a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def validate_body(body: dict[str, object], model: type[BodyModel]) -> BodyModel:
    """`body` as `model`; unknown keys are ignored, unsupported ones refused."""
    refuse_unsupported(body)
    unknown = body.keys() - model.model_fields.keys()
    if unknown:
        structlog.get_logger(component="api").debug("body.unknown_fields", fields=sorted(unknown))
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _describe(error) from error
    except RecursionError as error:
        raise BadRequestError("the request body is nested too deeply") from error


def _describe(error: ValidationError) -> BadRequestError:
    """The first finding as a sentence that begins with the parameter."""
    finding = error.errors(include_url=False, include_input=False)[0]
    location = [str(part) for part in finding["loc"]]
    param = location[0] if location else None
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "missing":
        message = "is required"
    where = ".".join(part for part in location if part.isdigit() or part.isidentifier())
    return BadRequestError(f"{where or 'body'}: {message}", param=param)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_surrogates(body: object) -> None:
    """Half a surrogate pair is valid JSON but no text: nothing could be tokenised."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string holds half of a surrogate pair") from error
