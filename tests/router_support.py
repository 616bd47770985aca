"""What the router's tests share: a tiny byte-level tokenizer, and a whole router in one process.

In the tiny vocabulary token `n` below 256 is byte `n`, so a scripted output is simply a text.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from services.router.detokenizer import byte_alphabet
from services.router.service import RouterService
from services.router.settings import RouterSettings
from services.router.tokenizer import ModelTokenizer, load_tokenizer
from shared.bus.memory import MemoryBus, MemoryServer
from tests.conftest import eventually
from tests.stub_worker import StubBehaviour, StubWorker, TokenSource, hashed_token, publish_plan

EOS_ID = 257
MAX_MODEL_LEN = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}:{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


def write_tiny_tokenizer(directory: Path) -> Path:
    """A model directory without weights: 256 bytes, `<|start|>` and `<|end|>`."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|start|>", "<|end|>")]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE},
        "config.json": {"max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": EOS_ID},
        "generation_config.json": {"eos_token_id": EOS_ID},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


def text_tokens(text: str) -> list[int]:
    """The tiny tokenizer's ids of a text."""
    return list(text.encode())


#: Printable ASCII that depends on seed and position.
ASCII_TOKENS = hashed_token(0x21, 0x7F)


@dataclass
class Cluster:
    """Routers and stub workers on one in-memory bus."""

    server: MemoryServer
    bus: MemoryBus
    tokenizer: ModelTokenizer
    model_dir: Path
    workers: dict[str, StubWorker] = field(default_factory=dict)
    services: list[RouterService] = field(default_factory=list)
    url: str = ""
    _stops: list[asyncio.Event] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _buses: list[MemoryBus] = field(default_factory=list)

    async def add_router(self, **settings: Any) -> RouterService:
        """Start a router; returns when it listens."""
        values: dict[str, Any] = {
            "port": 0,
            "model": str(self.model_dir),
            "served_model_name": "tiny",
            "lease_ttl_seconds": 6.0,
        }
        configured = RouterSettings(**{**values, **settings})
        bus = MemoryBus(self.server, configured.router_id)
        self._buses.append(bus)
        service = RouterService(configured, bus, self.tokenizer)
        stop = asyncio.Event()
        self._stops.append(stop)
        self._tasks.append(asyncio.create_task(service.run(stop)))
        async with asyncio.timeout(5):
            await service.listening.wait()
        self.services.append(service)
        self.url = self.url or service.url
        return service

    async def add_worker(
        self,
        worker_id: str,
        behaviour: StubBehaviour | None = None,
        tokens: TokenSource = ASCII_TOKENS,
    ) -> StubWorker:
        """Start a stub worker and give it a group in the plan."""
        worker = StubWorker(self.bus, worker_id, tokens, behaviour)
        self.workers[worker_id] = worker
        await worker.start()
        await publish_plan(self.bus, list(self.workers))
        return worker

    async def ready(self) -> None:
        """Return when every router has every living worker in its picture."""
        alive = {name for name, worker in self.workers.items() if worker.is_alive}

        def sees_all() -> bool:
            return all(
                alive
                <= {
                    group.leader for group in service.context.fleet.serving_groups(time.monotonic())
                }
                for service in self.services
            )

        await eventually(sees_all)

    def stop_router(self, number: int) -> asyncio.Task[None]:
        """Ask a router to drain and end; returns its task."""
        self._stops[number].set()
        return self._tasks[number]

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.kill()
        for stop in self._stops:
            stop.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*self._tasks)
        for bus in (*self._buses, self.bus):
            await bus.close()


@asynccontextmanager
async def running_cluster(directory: Path) -> AsyncIterator[Cluster]:
    """An empty cluster; nothing is left running afterwards."""
    model_dir = write_tiny_tokenizer(directory / "tiny")
    server = MemoryServer(time.monotonic)
    cluster = Cluster(server, MemoryBus(server, "workers"), load_tokenizer(model_dir), model_dir)
    try:
        yield cluster
    finally:
        await cluster.close()


@dataclass
class Events:
    """A stream of events as a client saw it."""

    status: int
    chunks: list[dict[str, Any]]
    is_done: bool
    raw: str

    @property
    def text(self) -> str:
        """All text of choice 0."""
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", [])]
        return "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
        )

    @property
    def finish_reasons(self) -> list[str]:
        return [
            choice["finish_reason"]
            for chunk in self.chunks
            for choice in chunk.get("choices", [])
            if choice["finish_reason"]
        ]


async def post_stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Events:
    """POST a streaming request and read it to its end; every line must be an event."""
    async with session.post(url, json={**body, "stream": True}) as response:
        raw = await response.text()
        if response.content_type != "text/event-stream":
            return Events(response.status, [json.loads(raw)], False, raw)
    lines = [line for line in raw.split("\n\n") if line]
    payloads = [line.removeprefix("data: ") for line in lines]
    assert all(line.startswith("data: ") for line in lines)
    is_done = payloads[-1:] == ["[DONE]"]
    chunks = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    return Events(response.status, chunks, is_done, raw)
