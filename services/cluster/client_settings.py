"""Settings of the commands that ask a running router."""

from __future__ import annotations

from pydantic import Field

from shared.settings import Settings


class ClientSettings(Settings):
    """Where the cluster is, and the keys to it."""

    url: str = Field(default="http://127.0.0.1:8000", description="URL of a router, without /v1")
    api_key: str | None = Field(default=None, description="bearer token that /v1 asks for")
    admin_key: str | None = Field(default=None, description="bearer token that /admin asks for")
    timeout_seconds: float = Field(default=5.0, gt=0.0, description="longest wait for an answer")
