"""Known parameters of other servers that would change the answer and are not supported.

A client that asks for one must hear so; the value that asks for nothing passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.router.errors import BadRequestError


def _is_one(value: object) -> bool:
    return value == 1 and not isinstance(value, bool)


def _is_empty(value: object) -> bool:
    return value in ([], {}, "", False)


def _is_none_or_auto(value: object) -> bool:
    return value in ("none", "auto")


def _is_text_format(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "text"


def _is_text_only(value: object) -> bool:
    return value == ["text"]


#: Parameter -> the values that ask for nothing.
_NEUTRAL: dict[str, Callable[[object], bool]] = {
    "n": _is_one,
    "best_of": _is_one,
    "tools": _is_empty,
    "tool_choice": _is_none_or_auto,
    "functions": _is_empty,
    "function_call": _is_none_or_auto,
    "response_format": _is_text_format,
    "modalities": _is_text_only,
    "audio": _is_empty,
    "prediction": _is_empty,
    "web_search_options": _is_empty,
    "suffix": _is_empty,
    "use_beam_search": _is_empty,
    "prompt_logprobs": _is_empty,
    "bad_words": _is_empty,
    "allowed_token_ids": _is_empty,
    "logits_processors": _is_empty,
    "structured_outputs": _is_empty,
    "guided_json": _is_empty,
    "guided_regex": _is_empty,
    "guided_choice": _is_empty,
    "guided_grammar": _is_empty,
    "truncate_prompt_tokens": _is_empty,
    "chat_template": _is_empty,
    "documents": _is_empty,
}


def refuse_unsupported(body: Mapping[str, object]) -> None:
    """Raise BadRequestError for the first parameter of `body` that asks for the unsupported."""
    for name, is_neutral in _NEUTRAL.items():
        if name in body and not is_neutral(body[name]):
            raise BadRequestError(f"{name} is not supported by this server", param=name)
