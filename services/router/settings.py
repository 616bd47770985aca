"""Settings of one router process."""

from __future__ import annotations

import secrets
from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator

from shared.service_settings import ServiceSettings
from shared.settings import ByteSize
from shared.subjects import validate_name

MIB = 1024**2


class GenerationDefaults(StrEnum):
    """Where sampling parameters that a request leaves out come from."""

    AUTO = "auto"  # the model's generation_config.json, as vLLM does; then OpenAI's defaults
    NONE = "none"  # OpenAI's defaults


def default_router_id() -> str:
    """A fresh name: several routers may run side by side."""
    return f"router-{secrets.token_hex(4)}"


class RouterSettings(ServiceSettings):
    """One HTTP endpoint of the cluster."""

    router_id: str = Field(
        default_factory=default_router_id, description="unique name (default: random)"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on, 0 for any free")
    model: str = Field(
        default="builtin:smollm2",
        description="builtin:smollm2, a Hugging Face directory, or a GGUF file (for its tokenizer)",
    )
    served_model_name: str | None = Field(
        default=None, description="name of the model in the API (default: derived from the model)"
    )
    cache_dir: Path | None = Field(default=None, description="where converted models are kept")
    max_model_len: int | None = Field(
        default=None, ge=1, description="longest prompt plus output (default: the model's)"
    )
    generation_config: GenerationDefaults = Field(
        default=GenerationDefaults.AUTO,
        description="auto takes sampling defaults from the model's generation_config.json, none"
        " takes OpenAI's",
    )
    api_key: str | None = Field(default=None, description="bearer token that /v1 asks for")
    admin_key: str | None = Field(default=None, description="bearer token that /admin asks for")
    max_body_bytes: ByteSize = Field(default=8 * MIB, ge=1024, description="largest request body")
    max_queued_requests: int = Field(
        default=1024, ge=0, description="requests that may wait for a worker"
    )
    max_queued_tokens: int = Field(
        default=1_000_000, ge=0, description="prompt tokens that may wait for a worker"
    )
    max_batch_prompts: int = Field(
        default=128, ge=1, description="prompts in one completions request"
    )
    queue_timeout_seconds: float = Field(
        default=120.0, gt=0.0, description="longest wait for room on a busy cluster"
    )
    no_worker_timeout_seconds: float = Field(
        default=30.0, gt=0.0, description="longest wait while no worker serves the model"
    )
    dispatch_timeout_seconds: float = Field(
        default=2.0, gt=0.0, description="time a worker has to answer a request"
    )
    slow_client_timeout_seconds: float = Field(
        default=60.0, gt=0.0, description="a client that does not read for so long is dropped"
    )
    keepalive_timeout_seconds: float = Field(
        default=75.0, gt=0.0, description="idle time before a kept-alive connection is closed"
    )
    drain_timeout_seconds: float = Field(
        default=120.0, ge=0.0, description="time running requests get at shutdown"
    )

    @field_validator("router_id")
    @classmethod
    def _check_router_id(cls, value: str) -> str:
        return validate_name(value, "router id")
