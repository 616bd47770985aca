"""Bodies of the requests, as pydantic models; `/openapi.json` is made of them.

Strict types: what is declared a number must be one. Fields that no model has are ignored, since
clients send new ones all the time; those that would change the answer are refused by name
(`unsupported.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_STOP_STRINGS = 16

StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(BaseModel):
    """What a stream shall carry besides the text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(BaseModel):
    """What both generation endpoints take. None means: not given."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, description="-1 or 0 keeps every token")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    stop: list[StopString] = Field(default_factory=list, max_length=MAX_STOP_STRINGS)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=128)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    return_token_ids: bool = False
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[str, float]) -> dict[str, float]:
        for token_id, bias in value.items():
            if not token_id.isascii() or not token_id.isdigit():
                raise ValueError(f"{token_id!r} is no token id")
            if not -100.0 <= bias <= 100.0:
                raise ValueError(f"the bias of token {token_id} must be between -100 and 100")
        return value


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Other keys are handed to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str = Field(min_length=1, max_length=64)
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: content is one text."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, value: object) -> object:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if all(isinstance(entry, str) for entry in value) or _are_token_ids(value):
                return value
            if all(isinstance(entry, list) and _are_token_ids(entry) for entry in value):
                return value
        raise ValueError("must be a text, a list of texts, token ids, or a list of lists of them")

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request: one choice each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(entry, int) for entry in self.prompt):
            return [[entry for entry in self.prompt if isinstance(entry, int)]]
        return [entry for entry in self.prompt if not isinstance(entry, int)]


def _are_token_ids(values: list[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


class TokenizeRequest(BaseModel):
    """Body of `POST /tokenize`: a prompt, or messages."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(BaseModel):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: list[int]


class DrainRequest(BaseModel):
    """Body of `POST /admin/drain`."""

    model_config = ConfigDict(strict=True)

    worker: str = Field(min_length=1)


class LayoutRequest(BaseModel):
    """Body of `POST /admin/drop` and `POST /admin/restore`."""

    model_config = ConfigDict(strict=True)

    workers: list[str] = Field(
        default_factory=list, description="ids of workers; none: the whole cluster"
    )
    dry_run: bool = Field(default=False, description="only show the plan")
    hold_seconds: float | None = Field(
        default=None, ge=0.0, description="how long the planner must not undo it by itself"
    )
