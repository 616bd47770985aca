"""Bad input over HTTP: a clear sentence in OpenAI's shape, nothing left behind, no traceback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.conftest import eventually
from tests.integration.harness import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="session")

MODEL, MODEL_LENGTH = "smollm2", 8192
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


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
