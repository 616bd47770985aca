"""Rendering messages to a prompt with the model's own jinja2 template.

Does what `transformers.apply_chat_template` does (same environment: sandboxed, trim and lstrip
blocks, loop controls, `{% generation %}`, `tojson`, `raise_exception`, `strftime_now`), without
importing transformers, which loads torch. `test_router_chat_template.py` compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from services.router.errors import BadRequestError
from shared.errors import ConfigError

#: Stands at the end of the message to continue while the template renders; its last character
#: shows whether the template strips messages.
_END_MARK = "<<end of the message to continue>> "


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`...`{% endgeneration %}` marks the assistant's text for training.

    For a prompt the marks mean nothing: the body is rendered as it is.
    """

    tags = {"generation"}  # noqa: RUF012 - declared as a plain set by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by name
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML characters, which changes the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are the variables `bos_token`, `eos_token`, ...

        Raises:
            ConfigError: the template does not parse.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template does not parse: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`.

        With `continue_final_message` the prompt ends with the last message's text, unclosed, for
        the model to go on with it.

        Raises:
            BadRequestError: the template refuses these messages.
        """
        chat: list[Mapping[str, Any]] = list(messages)
        if continue_final_message:
            chat[-1] = {**chat[-1], "content": f"{chat[-1]['content']}{_END_MARK}"}
        values: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        values.update(variables or {})
        values["messages"] = chat
        values["add_generation_prompt"] = add_generation_prompt
        try:
            prompt = self._template.render(values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise BadRequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return _cut_at_mark(prompt) if continue_final_message else prompt


def _cut_at_mark(prompt: str) -> str:
    """`prompt` up to the end of the final message's text."""
    position = prompt.rfind(_END_MARK.rstrip())
    if position < 0:
        raise BadRequestError(
            "continue_final_message is not possible: the chat template leaves out the last message",
            param="continue_final_message",
        )
    text = prompt[:position]
    # A template that strips messages would have stripped the end of this one, too.
    return text if prompt.startswith(_END_MARK, position) else text.rstrip()
