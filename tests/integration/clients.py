"""Clients of a test cluster: many completion requests at once, and all that each one was told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from tests.conftest import eventually

#: Longer than anything a router waits for before it gives an answer or an error.
ANSWER_SECONDS = 60.0


def completion(number: int, max_tokens: int = 300, **fields: Any) -> dict[str, Any]:
    """Request `number`; every third one is greedy, the others are drawn with a seed.

    Of fixed length, so that a lost or repeated token shows in the count as well as in the text.
    """
    sampling = {"temperature": 0.0} if number % 3 == 0 else {"temperature": 1.0, "seed": number}
    return {
        "prompt": f"{number}: the quick brown fox jumps over the lazy dog",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        **sampling,
        **fields,
    }


def chat(number: int, max_tokens: int = 300, **fields: Any) -> dict[str, Any]:
    """The same as `completion`, as a chat."""
    body = completion(number, max_tokens, **fields)
    content = f"{body.pop('prompt')}, is it not?"
    return {**body, "messages": [{"role": "user", "content": content}]}


@dataclass
class Answer:
    """One completion or chat completion as its client has seen it so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[Any] = field(default_factory=list)

    def continues_as(self, whole: Answer) -> bool:
        """True if this is the beginning of `whole`, or all of it."""
        if self.finish_reason is not None:
            return self == whole
        num_tokens = len(self.token_ids)
        return (
            whole.text.startswith(self.text)
            and whole.token_ids[:num_tokens] == self.token_ids
            and whole.logprobs[: len(self.logprobs)] == self.logprobs
        )


class Stream:
    """A streamed answer on a connection of its own; `answer` grows while it runs.

    A body with messages is a chat completion, any other a completion.
    """

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.answer = Answer()
        self._task = asyncio.create_task(self._read(url, {**body, "stream": True}))

    @property
    def num_tokens(self) -> int:
        return len(self.answer.token_ids)

    @property
    def is_over(self) -> bool:
        return self._task.done()

    async def result(self) -> Answer:
        """The whole answer; raises AssertionError or aiohttp.ClientError where there is none."""
        return await self._task

    async def disconnect(self) -> None:
        """Go away, as a client does that has lost interest. Idempotent."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self, url: str, body: dict[str, Any]) -> Answer:
        async with (
            asyncio.timeout(ANSWER_SECONDS),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            session.post(f"{url}/v1/{_endpoint(body)}", json=body) as response,
        ):
            assert response.status == 200, await response.text()
            ended = False
            async for line in response.content:
                payload = line.decode().removeprefix("data: ").strip()
                if payload == "[DONE]":
                    ended = True
                elif payload:
                    assert not ended, f"{payload} after [DONE]"
                    self._take(json.loads(payload))
            assert ended, f"the stream broke off after {self.num_tokens} tokens"
        return self.answer

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        (choice,) = chunk["choices"]
        assert self.answer.finish_reason is None, f"{chunk} after the end"
        self.answer.text += choice["text"] if "text" in choice else choice["delta"]["content"]
        self.answer.token_ids += choice.get("token_ids", [])
        self.answer.logprobs += _logprobs(choice)
        self.answer.finish_reason = choice["finish_reason"]


def _endpoint(body: dict[str, Any]) -> str:
    return "chat/completions" if "messages" in body else "completions"


def _logprobs(choice: dict[str, Any]) -> list[Any]:
    """What a chunk says of its tokens, one entry for each."""
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    return list(zip(*columns, strict=True))


class Streams:
    """Several streams, spread over routers; use as a context manager, which ends what still runs.

    Args:
        urls: of the routers, taken in turn.
    """

    def __init__(self, urls: Sequence[str], bodies: Sequence[dict[str, Any]]) -> None:
        self.bodies = bodies
        self._urls = urls
        self.streams: list[Stream] = []

    async def __aenter__(self) -> Self:
        self.streams = [
            Stream(self._urls[index % len(self._urls)], body)
            for index, body in enumerate(self.bodies)
        ]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.disconnect()

    async def wait_tokens(self, num_tokens: int) -> None:
        """Return when every stream has so many tokens, or its end; fails where all have ended.

        On a busy machine some may be done before others have begun.
        """

        def have_all() -> bool:
            ended = [stream for stream in self.streams if stream.is_over]
            assert len(ended) < len(self.streams), "all streams ended before anything could happen"
            return all(s.is_over or s.num_tokens >= num_tokens for s in self.streams)

        await eventually(have_all, ANSWER_SECONDS)

    async def wait_more(self, num_tokens: int) -> None:
        """Return when every stream has so many tokens more than now, or has come to its end."""
        goals = [stream.num_tokens + num_tokens for stream in self.streams]

        def have_more() -> bool:
            return all(
                stream.is_over or stream.num_tokens >= goal
                for stream, goal in zip(self.streams, goals, strict=True)
            )

        await eventually(have_more, ANSWER_SECONDS)

    async def answers(self) -> list[Answer]:
        """The whole answers of all streams."""
        return [await stream.result() for stream in self.streams]

    async def disconnect(self) -> None:
        """All clients go away."""
        await asyncio.gather(*(stream.disconnect() for stream in self.streams))


class Undisturbed:
    """What clients read where nothing happens and nobody wants for memory."""

    def __init__(self) -> None:
        self._answers: dict[str, Answer] = {}

    async def ask(self, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        """Learn the answers to `bodies`."""
        async with Streams([url], bodies) as streams:
            for body, answer in zip(bodies, await streams.answers(), strict=True):
                self._answers[json.dumps(body)] = answer

    def check(self, streams: Streams) -> None:
        """What has arrived so far is what would have arrived."""
        for body, stream in zip(streams.bodies, streams.streams, strict=True):
            assert stream.answer.continues_as(self._answers[json.dumps(body)]), body

    async def check_ends(self, streams: Streams) -> None:
        """The same, when all streams have ended by themselves."""
        await streams.answers()
        self.check(streams)


async def ask(url: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """The answers to requests that are not streamed, sent all at once."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)

    async def one(session: aiohttp.ClientSession, body: dict[str, Any]) -> Answer:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == len(choice["token_ids"])
        return Answer(choice["text"], choice["token_ids"], choice["finish_reason"])

    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        return await asyncio.gather(*(one(session, body) for body in bodies))
