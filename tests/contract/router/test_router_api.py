"""The router's HTTP contract: shapes, streaming, errors. Stub workers, in-memory bus, real HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio

from tests.conftest import eventually
from tests.router_support import (
    EOS_ID,
    MAX_MODEL_LEN,
    Cluster,
    post_stream,
    running_cluster,
    text_tokens,
)
from tests.stub_worker import StubBehaviour, scripted_tokens

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
STORY = "Once upon a time 🙂 there was a köln."


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """One router, one worker that tells STORY and then ends."""
    async with running_cluster(tmp_path) as cluster:
        script = [*text_tokens(STORY), EOS_ID]
        await cluster.add_worker("w0", tokens=scripted_tokens(script))
        await cluster.add_router(max_body_bytes=64 * 1024, max_batch_prompts=4)
        await cluster.ready()
        yield cluster


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


async def post(
    http: aiohttp.ClientSession, url: str, body: dict[str, Any] | bytes
) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(url, data=data) as response:
        return response.status, await response.json()


# --- answers -------------------------------------------------------------------------------------


async def test_chat_answers_until_the_end_of_sequence(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    status, answer = await post(http, cluster.url + CHAT, {"model": "tiny", "messages": MESSAGES})
    assert status == 200
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == STORY
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    num_prompt = len("user:hi") + 2 + 1 + len("assistant:")
    num_output = len(STORY.encode()) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }


async def test_completion_defaults_to_sixteen_tokens(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    _, answer = await post(http, cluster.url + COMPLETIONS, {"prompt": "go"})
    assert answer["choices"][0]["text"] == STORY[:16]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


async def test_every_prompt_of_a_batch_gets_its_choice(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": ["a", "bc"], "max_tokens": 3, "echo": True}
    _, answer = await post(http, cluster.url + COMPLETIONS, body)
    assert [choice["text"] for choice in answer["choices"]] == ["a" + STORY[:3], "bc" + STORY[:3]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 6


async def test_prompts_may_be_token_ids(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    body = {"prompt": [[104, 105], [104]], "max_tokens": 2}
    _, answer = await post(http, cluster.url + COMPLETIONS, body)
    assert answer["usage"]["prompt_tokens"] == 3
    assert [choice["text"] for choice in answer["choices"]] == [STORY[:2]] * 2


async def test_ignore_eos_generates_exactly_max_tokens(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": "go", "max_tokens": 100, "ignore_eos": True}
    _, answer = await post(http, cluster.url + COMPLETIONS, body)
    assert answer["usage"]["completion_tokens"] == 100
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"].startswith(STORY + STORY)


async def test_a_stop_string_ends_text_and_work(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": "go", "max_tokens": 400, "stop": [" time", "never"], "ignore_eos": True}
    _, answer = await post(http, cluster.url + COMPLETIONS, body)
    choice = answer["choices"][0]
    assert choice["text"] == "Once upon a"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " time")
    assert answer["usage"]["completion_tokens"] == len("Once upon a time")
    assert cluster.workers["w0"].cancelled


async def test_a_stop_token_is_reported_and_not_shown(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": "go", "max_tokens": 50, "stop_token_ids": [ord("p")]}
    _, answer = await post(http, cluster.url + COMPLETIONS, body)
    choice = answer["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == ("Once u", ord("p"))


async def test_logprobs_of_both_shapes(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    _, answer = await post(http, cluster.url + CHAT, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["O", "n"]
    assert content[0]["bytes"] == [ord("O")]
    assert len(content[0]["top_logprobs"]) == 2
    _, answer = await post(
        http, cluster.url + COMPLETIONS, {"prompt": "x", "max_tokens": 2, "logprobs": 1}
    )
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["O", "n"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1]


# --- streams -------------------------------------------------------------------------------------


async def test_chat_stream_has_one_chunk_per_shown_token(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    events = await post_stream(http, cluster.url + CHAT, {"messages": MESSAGES})
    assert events.is_done
    assert events.text == STORY
    assert events.finish_reasons == ["stop"]
    first = events.chunks[0]["choices"][0]["delta"]
    assert first == {"role": "assistant", "content": "O"}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in events.chunks[1:])
    assert len(events.chunks) == len(STORY) + 1  # the last one ends it
    assert len({chunk["id"] for chunk in events.chunks}) == 1
    assert all("usage" not in chunk for chunk in events.chunks)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in events.chunks)


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": "go", "max_tokens": 5, "stream_options": {"include_usage": True}}
    events = await post_stream(http, cluster.url + COMPLETIONS, body)
    assert events.chunks[-1]["choices"] == []
    assert events.chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["choices"] and "usage" not in chunk for chunk in events.chunks[:-1])


async def test_running_usage_when_asked_for(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "go", "max_tokens": 5, "stream_options": options}
    events = await post_stream(http, cluster.url + COMPLETIONS, body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in events.chunks]
    assert counts == [1, 2, 3, 4, 5, 5]


async def test_batch_stream_carries_every_choice(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 15}
    events = await post_stream(http, cluster.url + COMPLETIONS, body)
    texts = ["", "", ""]
    for chunk in events.chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert len(events.finish_reasons) == 3
    assert texts == [STORY[:15]] * 3


async def test_no_chunk_splits_a_character(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    events = await post_stream(http, cluster.url + COMPLETIONS, {"prompt": "x", "max_tokens": 99})
    assert "\ufffd" not in events.raw
    assert events.text == STORY


async def test_a_failure_after_the_first_byte_is_an_event_without_done(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    behaviour = cluster.workers["w0"].behaviour
    async with http.post(
        cluster.url + COMPLETIONS,
        json={"prompt": "x", "max_tokens": 400, "stream": True, "ignore_eos": True},
    ) as response:
        assert response.status == 200
        await response.content.readuntil(b"\n\n")
        behaviour.fail_with = "the device burned"
        rest = (await response.content.read()).decode()
    last = json.loads(rest.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["message"] == "the device burned"
    assert "[DONE]" not in rest


async def test_a_failure_before_the_first_byte_is_a_status(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    cluster.workers["w0"].behaviour.fail_with = "the device burned"
    events = await post_stream(http, cluster.url + CHAT, {"messages": MESSAGES})
    assert events.status == 500
    assert events.chunks[0]["error"]["message"] == "the device burned"


# --- bad input -----------------------------------------------------------------------------------

LONG = "x" * (MAX_MODEL_LEN + 1)

BAD: list[tuple[str, str, dict[str, Any] | bytes, int, str | None]] = [
    ("malformed JSON", CHAT, b"{not json", 400, None),
    ("not UTF-8", CHAT, b'{"model": "\xff"}', 400, None),
    ("UTF-16", CHAT, '{"a": 1}'.encode("utf-16"), 400, None),
    ("half a surrogate pair", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None),
    ("not an object", CHAT, b"[]", 400, None),
    ("NaN", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, None),
    ("nested too deeply", CHAT, b'{"a":' * 10_000, 400, None),
    ("empty body", CHAT, b"", 400, None),
    ("no messages", CHAT, {"model": "tiny"}, 400, "messages"),
    ("empty messages", CHAT, {"messages": []}, 400, "messages"),
    ("a message that is no object", CHAT, {"messages": ["hi"]}, 400, "messages"),
    ("a message without a role", CHAT, {"messages": [{"content": "hi"}]}, 400, "messages"),
    (
        "an image",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages",
    ),
    ("no prompt", COMPLETIONS, {}, 400, "prompt"),
    ("empty prompt", COMPLETIONS, {"prompt": ""}, 400, "prompt"),
    ("empty list", COMPLETIONS, {"prompt": []}, 400, "prompt"),
    ("mixed prompt", COMPLETIONS, {"prompt": ["a", 1]}, 400, "prompt"),
    ("prompt of a wrong type", COMPLETIONS, {"prompt": 5}, 400, "prompt"),
    ("a token id too large", COMPLETIONS, {"prompt": [9999]}, 400, "prompt"),
    ("a negative token id", COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    ("too many prompts", COMPLETIONS, {"prompt": ["a"] * 5}, 400, "prompt"),
    ("prompt too long", COMPLETIONS, {"prompt": LONG}, 400, "prompt"),
    ("messages too long", CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, None),
    (
        "output too long",
        COMPLETIONS,
        {"prompt": "a", "max_tokens": MAX_MODEL_LEN},
        400,
        "max_tokens",
    ),
    ("max_tokens 0", COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("max_tokens negative", CHAT, {"messages": MESSAGES, "max_tokens": -1}, 400, "max_tokens"),
    (
        "max_tokens as text",
        CHAT,
        {"messages": MESSAGES, "max_tokens": "5"},
        400,
        "max_tokens",
    ),
    ("temperature as text", COMPLETIONS, {"prompt": "a", "temperature": "1"}, 400, "temperature"),
    ("temperature negative", COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature"),
    ("top_p 0", COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("top_k -2", COMPLETIONS, {"prompt": "a", "top_k": -2}, 400, "top_k"),
    ("stream as text", COMPLETIONS, {"prompt": "a", "stream": "yes"}, 400, "stream"),
    ("empty stop string", COMPLETIONS, {"prompt": "a", "stop": [""]}, 400, "stop"),
    ("too many stops", COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
    ("min over max", COMPLETIONS, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens"),
    ("bias without id", COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("bias of no token", COMPLETIONS, {"prompt": "a", "logit_bias": {"999": 1}}, 400, "logit_bias"),
    ("many logprobs", COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    ("top_logprobs alone", CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    ("n 2", CHAT, {"messages": MESSAGES, "n": 2}, 400, "n"),
    ("best_of 2", COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "best_of"),
    ("tools", CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools"),
    ("tool_choice", CHAT, {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice"),
    (
        "response_format",
        CHAT,
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    ("unknown model", CHAT, {"model": "gpt-7", "messages": MESSAGES}, 404, "model"),
    ("body over the limit", CHAT, b'{"a": "' + b"x" * 70_000 + b'"}', 413, None),
    ("unknown path", "/v1/nothing", {}, 404, None),
    ("detokenize a wrong id", "/detokenize", {"tokens": [9999]}, 400, "tokens"),
    ("tokenize nothing", "/tokenize", {}, 400, "prompt"),
]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [case[1:] for case in BAD],
    ids=[case[0] for case in BAD],
)
async def test_bad_input_gets_one_clear_sentence(
    cluster: Cluster,
    http: aiohttp.ClientSession,
    path: str,
    body: dict[str, Any] | bytes,
    status: int,
    param: str | None,
) -> None:
    got, answer = await post(http, cluster.url + path, body)
    assert got == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    assert "Traceback" not in error["message"]
    if param is not None:
        assert error["param"] == param
    assert len(cluster.services[0].context.generator) == 0


async def test_wrong_method_is_405(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    async with http.get(cluster.url + CHAT) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == 405


async def test_null_is_absent_and_unknown_fields_are_ignored(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    body = {
        "prompt": "a",
        "max_tokens": None,
        "logprobs": None,
        "stop": None,
        "n": 1,
        "tools": [],
        "made_up": {"x": 1},
    }
    status, answer = await post(http, cluster.url + COMPLETIONS, body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 16


async def test_prompt_larger_than_every_kv_cache_is_refused(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker("w0", StubBehaviour(max_model_len=64))
        await cluster.add_router()
        await cluster.ready()
        status, answer = await post(http, cluster.url + COMPLETIONS, {"prompt": "x" * 64})
        assert status == 400
        assert "64" in answer["error"]["message"]
        _, answer = await post(http, cluster.url + CHAT, {"messages": MESSAGES})
        assert answer["usage"]["total_tokens"] == 64  # the default output is what fits


# --- the other endpoints -------------------------------------------------------------------------


async def test_models_and_text_endpoints(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    async with http.get(cluster.url + "/v1/models") as response:
        card = (await response.json())["data"][0]
    assert card["id"] == "tiny"
    assert card["root"] == str(cluster.model_dir)
    assert card["max_model_len"] == MAX_MODEL_LEN
    async with http.get(cluster.url + "/v1/models/tiny") as response:
        assert (await response.json())["id"] == "tiny"
    async with http.get(cluster.url + "/v1/models/other") as response:
        assert response.status == 404
    _, answer = await post(http, cluster.url + "/tokenize", {"prompt": "hé"})
    assert (answer["tokens"], answer["count"]) == ([0x68, 0xC3, 0xA9], 3)
    _, answer = await post(http, cluster.url + "/tokenize", {"messages": MESSAGES})
    assert answer["tokens"][0] == 256
    _, answer = await post(http, cluster.url + "/detokenize", {"tokens": [0x68, 0xC3, 0xA9]})
    assert answer == {"prompt": "hé"}


async def test_health_says_whether_a_request_would_succeed(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    for path in ("/health", "/ready", "/ping", "/live", "/version", "/load", "/openapi.json"):
        async with http.get(cluster.url + path) as response:
            assert response.status == 200, path
    await cluster.workers["w0"].kill()

    async def is_unhealthy() -> bool:
        async with http.get(cluster.url + "/health") as response:
            return response.status == 503 and "Retry-After" in response.headers

    await eventually(is_unhealthy)
    async with http.get(cluster.url + "/live") as response:
        assert response.status == 200


async def test_cluster_has_the_documented_shape(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    async with http.get(cluster.url + "/cluster") as response:
        view = await response.json()
    assert set(view) == {
        "epoch",
        "term",
        "state",
        "groups",
        "workers",
        "decision",
        "transitions",
    }
    assert view["state"] == "stable"
    (group,) = view["groups"]
    assert set(group) == {
        "id",
        "leader",
        "members",
        "requests_running",
        "requests_waiting",
        "kv_blocks_used",
        "kv_blocks_waiting",
        "kv_blocks_total",
    }
    assert group["members"] == [{"worker": "w0", "layers": [0, 2]}]
    (worker,) = view["workers"]
    assert set(worker) == {
        "id",
        "layers",
        "device",
        "memory_bytes",
        "weight_bytes",
        "kv_bytes",
        "free_bytes",
        "state",
    }
    assert worker["layers"] == [[0, 2]]


async def test_metrics_count_requests_and_tokens(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    await post(http, cluster.url + COMPLETIONS, {"prompt": "abc", "max_tokens": 7})
    async with http.get(cluster.url + "/metrics") as response:
        text = await response.text()
    assert 'vllm:generation_tokens_total{model_name="tiny"} 7.0' in text
    assert 'vllm:prompt_tokens_total{model_name="tiny"} 3.0' in text
    assert 'kunserve_router_requests_total{code="200",path="/v1/completions"} 1.0' in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in text


async def test_request_id_is_echoed_and_part_of_the_answer(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    async with http.post(
        cluster.url + COMPLETIONS, json={"prompt": "a"}, headers={"X-Request-Id": "abc-1"}
    ) as response:
        assert response.headers["X-Request-Id"] == "abc-1"
        assert (await response.json())["id"] == "cmpl-abc-1"
    async with http.get(cluster.url + "/nothing") as response:
        assert response.headers["X-Request-Id"]


async def test_api_key_guards_the_api_and_not_the_health(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker("w0")
        await cluster.add_router(api_key="secret", admin_key="root")
        await cluster.ready()
        url = cluster.url
        assert (await post(http, url + COMPLETIONS, {"prompt": "a"}))[0] == 401
        headers = {"Authorization": "Bearer wrong"}
        async with http.get(url + "/v1/models", headers=headers) as response:
            assert response.status == 401
            assert (await response.json())["error"]["code"] == 401
        headers = {"Authorization": "Bearer secret"}
        async with http.get(url + "/v1/models", headers=headers) as response:
            assert response.status == 200
        async with http.post(url + "/admin/drain", json={"worker": "w0"}, headers=headers) as r:
            assert r.status == 401
        async with http.get(url + "/health") as response:
            assert response.status == 200


async def test_draining_a_worker_without_a_planner_says_so(
    cluster: Cluster, http: aiohttp.ClientSession
) -> None:
    status, answer = await post(http, cluster.url + "/admin/drain", {"worker": "w0"})
    assert status == 503
    assert "planner" in answer["error"]["message"]


# --- the OpenAI SDK ------------------------------------------------------------------------------


async def test_the_openai_sdk_works_unmodified(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=cluster.url + "/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.content == STORY
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            usage = chunk.usage or usage
        assert text == STORY
        assert usage is not None
        assert usage.completion_tokens == len(STORY.encode()) + 1
        completion = await client.completions.create(model="tiny", prompt="x", max_tokens=4)
        assert completion.choices[0].text == STORY[:4]
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="x", max_tokens=0)
