"""The built-in model behind two workers, as clients of the OpenAI API meet it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from services.router.tokenizer import ModelTokenizer, load_tokenizer
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model
from tests.integration.harness import Cluster
from tests.tiny_models import load_reference
from tests.unit.model.request_helpers import greedy_reference, make_request

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "smollm2"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "¿Qué es el átomo? 原子とは何ですか 🙂",
    "Repeat: " + "a quick brown fox, " * 30,
]
MAX_TOKENS = 16


# --- answers -------------------------------------------------------------------------------------


async def test_greedy_text_is_that_of_generate(sdk: AsyncOpenAI) -> None:
    directory = resolve_model(
        "builtin:smollm2", default_cache_dir(os.environ), ProgressReporter(sys.stderr, "converting")
    )
    tokenizer = load_tokenizer(directory)
    answers = await asyncio.gather(
        *(
            sdk.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                max_tokens=MAX_TOKENS,
                temperature=0,
            )
            for question in QUESTIONS
        )
    )
    for question, answer in zip(QUESTIONS, answers, strict=True):
        text = answer.choices[0].message.content
        assert text
        expected = await reference_text(tokenizer, question)
        assert expected
        assert text.startswith(expected)


async def reference_text(tokenizer: ModelTokenizer, question: str) -> str:
    """What transformers answers, up to the first step where two tokens are equally good."""
    assert tokenizer.chat_template is not None
    prompt = tokenizer.chat_template.render([{"role": "user", "content": question}])
    token_ids = await tokenizer.encode(prompt, add_special_tokens=False)
    eos = tokenizer.facts.eos_token_ids
    request = make_request("", token_ids, eos, max_tokens=MAX_TOKENS, temperature=0.0)
    model = load_reference(tokenizer.facts.directory)
    generated = greedy_reference(model, request)
    return tokenizer.decode(generated, skip_special_tokens=True).rstrip("\ufffd")


async def test_chat_streams_what_it_answers(sdk: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = await sdk.chat.completions.create(**options)
    stream = await sdk.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == whole.choices[0].message.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == whole.choices[0].message.content
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert {chunk.model for chunk in chunks} == {whole.model} == {MODEL}
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_stream_what_they_answer(sdk: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0}
    whole = await sdk.completions.create(**options, max_tokens=12)
    stream = await sdk.completions.create(
        **options, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.choices[0].finish_reason == "length"


async def test_several_prompts_get_their_own_choices(sdk: AsyncOpenAI) -> None:
    prompts = ["Once upon a time", "The sky is", "1 2 3 4"]
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    together = await sdk.completions.create(prompt=prompts, **options)
    alone = [await sdk.completions.create(prompt=prompt, **options) for prompt in prompts]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


async def test_a_seed_repeats_an_answer(sdk: AsyncOpenAI) -> None:
    async def answer(seed: int) -> str | None:
        one = await sdk.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=12, temperature=1.5, top_p=0.95, seed=seed
        )
        return one.choices[0].message.content

    first, second, other = await asyncio.gather(answer(1), answer(1), answer(2))
    assert first == second
    assert first != other
    assert await answer(1) == first


async def test_a_stop_string_ends_the_answer_before_it(sdk: AsyncOpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "1, 2, 3, 4, 5, 6,", "temperature": 0}
    whole = (await sdk.completions.create(**options, max_tokens=16)).choices[0]
    assert "10" in whole.text
    stopped = (await sdk.completions.create(**options, max_tokens=16, stop=["10"])).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text.partition("10")[0]
    stream = await sdk.completions.create(**options, max_tokens=16, stop=["10"], stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == stopped.text


async def test_logprobs_belong_to_the_tokens_chosen(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content
    assert entries is not None
    assert answer.usage is not None
    assert len(entries) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
        assert entry.token == entry.top_logprobs[0].token
    completion = await sdk.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=5, temperature=0, logprobs=2
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text


async def test_the_model_is_listed(sdk: AsyncOpenAI) -> None:
    (model,) = (await sdk.models.list()).data
    assert model.id == MODEL
    assert await sdk.models.retrieve(MODEL) == model


async def test_text_and_tokens_are_each_others_inverse(http: aiohttp.ClientSession) -> None:
    text = QUESTIONS[2]
    async with http.post("/tokenize", json={"model": MODEL, "prompt": text}) as response:
        tokenized = await response.json()
    assert tokenized["count"] == len(tokenized["tokens"])
    tokens = {"model": MODEL, "tokens": tokenized["tokens"]}
    async with http.post("/detokenize", json=tokens) as response:
        assert (await response.json())["prompt"] == text


# --- what operators read -------------------------------------------------------------------------


async def test_metrics_can_be_parsed_and_count_what_was_served(
    http: aiohttp.ClientSession, sdk: AsyncOpenAI, shared_cluster: Cluster
) -> None:
    router = shared_cluster.routers[0]
    before = await shared_cluster.metric(router, "vllm:generation_tokens_total")
    await sdk.completions.create(model=MODEL, prompt="Hello", max_tokens=5, temperature=0)
    assert await shared_cluster.metric(router, "vllm:generation_tokens_total") == before + 5
    for process in shared_cluster.processes:
        async with http.get(f"{process.url}/metrics") as response:
            assert response.status == 200
            families = list(text_string_to_metric_families(await response.text()))
        names = [family.name for family in families]
        assert len(names) == len(set(names)), process.name
        assert any(name.startswith("kunserve_") for name in names), process.name
        assert all(family.documentation for family in families), process.name


CLUSTER = {
    "epoch": int,
    "term": int,
    "state": str,
    "groups": [
        {
            "id": str,
            "leader": str,
            "members": [{"worker": str, "layers": [int]}],
            "requests_running": int,
            "requests_waiting": int,
            "kv_blocks_used": int,
            "kv_blocks_waiting": int,
            "kv_blocks_total": int,
        }
    ],
    "workers": [
        {
            "id": str,
            "layers": [[int]],
            "device": str,
            "memory_bytes": int,
            "weight_bytes": int,
            "kv_bytes": int,
            "free_bytes": int,
            "state": str,
        }
    ],
    "decision": {
        "action": str,
        "rule": str,
        "detail": str,
        "figures": dict,
        "decided_at": float,
    },
    "transitions": [dict],
}


def has_shape(value: Any, shape: Any) -> bool:
    """Whether `value` has exactly the keys and types of `shape`; a list has entries of one."""
    if isinstance(shape, type):
        return type(value) is shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(entry, shape[0]) for entry in value)
    return (
        isinstance(value, dict)
        and value.keys() == shape.keys()
        and all(has_shape(value[key], shape[key]) for key in shape)
    )


async def test_cluster_has_the_documented_shape(shared_cluster: Cluster) -> None:
    view = await shared_cluster.cluster()
    assert has_shape(view, CLUSTER), view
    assert view["state"] == "stable"
    assert view["epoch"] >= 1
    workers = {worker["id"]: worker for worker in view["workers"]}
    assert set(workers) == {worker.name for worker in shared_cluster.workers}
    for group in view["groups"]:
        (member,) = group["members"]
        assert member["worker"] == group["leader"]
        assert member["layers"] == [0, 30]
        assert workers[group["leader"]]["layers"] == [[0, 30]]
    for worker in workers.values():
        parts = worker["weight_bytes"] + worker["kv_bytes"] + worker["free_bytes"]
        assert parts == worker["memory_bytes"]
    assert all({"cause", "phase_seconds"} <= entry.keys() for entry in view["transitions"])
