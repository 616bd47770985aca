"""The built-in model behind two workers, as clients of the OpenAI API meet it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from services.router.tokenizer import ModelTokenizer, load_tokenizer
from shared.cache_dir import default_cache_dir
from shared.models import ProgressReporter, resolve_model
from tests.conftest import eventually
from tests.integration.harness import Cluster
from tests.tiny_models import load_reference
from tests.unit.model.request_helpers import greedy_reference, make_request

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL = "smollm2"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "¿Qué es el átomo? 原子とは何ですか 🙂",
    "Repeat: " + "a quick brown fox, " * 30,
]
MAX_TOKENS = 16
MODEL_LENGTH = 8192


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(shared_cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{shared_cluster.url}/v1", api_key="none", timeout=60, max_retries=0
    ) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def http(shared_cluster: Cluster) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        shared_cluster.url, timeout=aiohttp.ClientTimeout(total=60)
    ) as session:
        yield session


# --- answers -------------------------------------------------------------------------------------


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads of torch wait for each other by spinning, which is slow where cores are busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("one_torch_thread")
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


# --- bad input -----------------------------------------------------------------------------------


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": MESSAGES, **fields}).encode()


def complete(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Hello", **fields}).encode()


BAD = {
    "malformed JSON": (CHAT, b'{"model": "smollm2", "messages": [', 400),
    "not UTF-8": (CHAT, chat().replace(b"capital", b"\xff\xfe"), 400),
    "no object": (COMPLETIONS, b'"Hello"', 400),
    "an empty body": (COMPLETIONS, b"", 400),
    "messages of a wrong type": (CHAT, chat(messages="Hello"), 400),
    "a prompt of a wrong type": (COMPLETIONS, complete(prompt={"text": "Hello"}), 400),
    "temperature as text": (CHAT, chat(temperature="hot"), 400),
    "max_tokens as text": (COMPLETIONS, complete(max_tokens="5"), 400),
    "max_tokens 0": (COMPLETIONS, complete(max_tokens=0), 400),
    "max_tokens -1": (CHAT, chat(max_tokens=-1), 400),
    "unknown model": (CHAT, chat(model="gpt-7"), 404),
    "n 2": (CHAT, chat(n=2), 400),
    "tools": (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400),
    "a prompt longer than the model": (COMPLETIONS, complete(prompt=[1] * MODEL_LENGTH), 400),
    "messages longer than the model": (
        CHAT,
        chat(messages=[{"role": "user", "content": "word " * MODEL_LENGTH}]),
        400,
    ),
    "a text longer than any": (COMPLETIONS, complete(prompt="word " * 10**6), 400),
    "more output than the model has room": (COMPLETIONS, complete(max_tokens=MODEL_LENGTH), 400),
    "a body over the limit": (COMPLETIONS, complete(prompt="word " * 2 * 10**6), 413),
    "an unknown path": ("/v1/embeddings", chat(), 404),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
async def test_bad_input_gets_one_clear_sentence(
    http: aiohttp.ClientSession, case: str, stream: bool
) -> None:
    path, body, expected_status = BAD[case]
    if stream:
        body = body.replace(b'{"model"', b'{"stream": true, "model"', 1)
    status, error = await refusal(http, path, body)
    assert status == expected_status
    assert error["code"] == expected_status


async def refusal(
    http: aiohttp.ClientSession, path: str, body: bytes, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and error of a request that must be refused, in OpenAI's shape."""
    async with http.post(
        path, data=body, headers={"Content-Type": "application/json", **headers}
    ) as response:
        assert response.content_type == "application/json"
        answer = await response.json()
    assert answer.keys() == {"error"}, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return response.status, error


async def test_a_prompt_longer_than_the_kv_pool_says_what_fits(
    http: aiohttp.ClientSession, shared_cluster: Cluster
) -> None:
    view = await shared_cluster.cluster()
    pool_tokens = max(group["kv_blocks_total"] for group in view["groups"]) * 16
    assert pool_tokens < MODEL_LENGTH
    status, error = await refusal(http, COMPLETIONS, complete(prompt=[1] * pool_tokens))
    assert status == 400
    assert error["param"] == "prompt"
    assert str(pool_tokens) in error["message"]


async def test_a_body_that_cannot_be_decompressed(http: aiohttp.ClientSession) -> None:
    headers = {"Content-Encoding": "gzip"}
    status, _ = await refusal(http, COMPLETIONS, b"not compressed", **headers)
    assert status == 400


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not HTTP at all\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"GET /live HTTP/1.1\r\nHost: a\r\nExpect: the-unexpected\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["tls", "length", "chunk", "expect", "target"],
)
async def test_what_is_not_http_is_refused(shared_cluster: Cluster, request_bytes: bytes) -> None:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", shared_cluster.router_port)
        writer.write(request_bytes)
        status_line = await reader.readline()
        writer.close()
    assert status_line.split()[1].startswith(b"4")


async def test_half_a_request_is_given_up_with_its_connection(
    http: aiohttp.ClientSession, shared_cluster: Cluster
) -> None:
    async with asyncio.timeout(10):
        _, writer = await asyncio.open_connection("127.0.0.1", shared_cluster.router_port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    async with http.get("/load") as response:
        assert (await response.json())["server_load"] == 0


async def test_bad_input_leaves_no_trace(sdk: AsyncOpenAI, shared_cluster: Cluster) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt="Hello", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"

    async def is_idle() -> bool:
        return await shared_cluster.kv_blocks_used() == 0

    await eventually(is_idle)
    for process in shared_cluster.processes:
        assert "Traceback" not in process.log
