"""Errors a client sees, in OpenAI's shape.

`{"error": {"message", "type", "param", "code"}}`; `code` is the HTTP status and the type names are
vLLM's. Raised anywhere in the router, turned into a response or an event of a stream in one place.
"""

from __future__ import annotations

from typing import ClassVar

from shared.errors import KunserveError

RETRY_AFTER_SECONDS = 1


class ApiError(KunserveError):
    """A request that cannot be served; `message` is one sentence for the person who sent it."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "InternalServerError"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response besides those every response has."""
        return {}

    def body(self) -> dict[str, object]:
        """The JSON object that describes this error."""
        return {
            "error": {
                "message": self.message,
                "type": self.error_type,
                "param": self.param,
                "code": self.status,
            }
        }


class BadRequestError(ApiError):
    """The request itself is wrong or asks for what is not supported."""

    status = 400
    error_type = "BadRequestError"


class UnauthorizedError(ApiError):
    """The key is missing or wrong."""

    status = 401
    error_type = "AuthenticationError"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotFoundError(ApiError):
    """No such model or path."""

    status = 404
    error_type = "NotFoundError"


class MethodNotAllowedError(ApiError):
    """The path exists, but not for this method."""

    status = 405
    error_type = "MethodNotAllowedError"

    def __init__(self, message: str, *, allowed: frozenset[str]) -> None:
        super().__init__(message)
        self._allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": ", ".join(sorted(self._allowed))}


class BodyTooLargeError(ApiError):
    """More bytes than the router takes, or than one bus message can carry."""

    status = 413
    error_type = "RequestEntityTooLargeError"


class RetryableError(ApiError):
    """It may work later; carries `Retry-After`."""

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_SECONDS)}


class OverloadedError(RetryableError):
    """Every worker and the router's own queue are full."""

    status = 429
    error_type = "TooManyRequestsError"


class UnavailableError(RetryableError):
    """No worker can be reached, or this router is going down."""

    status = 503
    error_type = "ServiceUnavailableError"


class GenerationFailedError(ApiError):
    """A worker gave the request up."""
