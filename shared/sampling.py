"""Sampling parameters of a request, as the API takes them and the worker applies them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SamplingParams(BaseModel):
    """How the tokens of one request are chosen (names and meanings as in vLLM).

    `seed` is always set by the router (drawn there when the client gave none), so that a replayed
    or preempted request draws the same noise: noise depends on (seed, position) and nothing else.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    max_tokens: int = Field(default=16, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, description="0 keeps every token")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    logit_bias: dict[int, float] = Field(default_factory=dict)
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="top alternatives to report; None reports nothing"
    )
