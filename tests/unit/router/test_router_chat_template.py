"""Rendering is what transformers renders, without transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from services.router.chat_template import ChatTemplate
from services.router.errors import BadRequestError
from shared.errors import ConfigError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role']"
    " + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{{ bos_token }}
{%- for message in messages %}
    {%- if loop.index0 == 5 %}{% break %}{% endif %}
    {% if message.role == 'user' %}
[{{ message.content | trim }}]
    {% elif message.role == 'assistant' %}
        {%- generation %}
{{ message.content }}{{ eos_token }}
        {%- endgeneration %}
    {% else %}
{{ message | tojson }} {{ {"a<b": ["é", 1]} | tojson(indent=2) }}
    {% endif %}
{%- endfor %}
{% set state = namespace(seen=false) %}{% set state.seen = true %}{{ state.seen }}
{%- if tools %}tools{% endif %}{{ flag | default('none') }}
"""
MESSAGES = [
    {"role": "system", "content": "Rules & <tags>"},
    {"role": "user", "content": "  What's 2 < 3? 🙂\n"},
    {"role": "assistant", "content": "Yes. "},
    {"role": "user", "content": "Why?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [CHATML, BLOCKS], ids=["chatml", "blocks"])
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"flag": "on"}])
def test_equals_transformers(
    source: str, generation_prompt: bool, variables: dict[str, Any]
) -> None:
    (reference,), _ = render_jinja_template(
        [MESSAGES],
        chat_template=source,
        add_generation_prompt=generation_prompt,
        **TOKENS,
        **variables,
    )
    rendered = ChatTemplate(source, TOKENS).render(
        MESSAGES, add_generation_prompt=generation_prompt, variables=variables
    )
    assert rendered == reference


@pytest.mark.parametrize("final", ["Sure: ", "Sure:", "Sure"])
@pytest.mark.parametrize("source", [CHATML, CHATML.replace("['content']", "['content'] | trim")])
def test_continuing_the_final_message_equals_transformers(source: str, final: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": final}]
    (reference,), _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, **TOKENS
    )
    rendered = ChatTemplate(source, TOKENS).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == reference
    assert messages[-1]["content"] == final


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('only users') }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
    ],
)
def test_a_template_that_refuses_is_the_clients_error(source: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_a_template_that_does_not_parse_is_the_operators_error() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% for %}", {})
