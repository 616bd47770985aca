"""The admin endpoints and the figures every service shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from prometheus_client import Counter

from shared.bus.memory import MemoryBus, MemoryServer
from shared.errors import ConfigError
from shared.metrics import AdminServer, BusCollector, admin_app, new_registry


@asynccontextmanager
async def admin(reasons: list[str]) -> AsyncIterator[tuple[str, MemoryServer]]:
    memory = MemoryServer(clock=lambda: 0.0)
    registry = new_registry()
    registry.register(BusCollector(MemoryBus(memory, "a")))
    Counter("kunserve_things", "things", ["kind"], registry=registry).labels("x").inc(3)
    app = admin_app(registry, lambda: reasons, lambda: {"belief": 42})
    server = AdminServer(app, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}", memory
    finally:
        await server.stop()


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_readiness_tells_its_reasons_and_liveness_does_not_depend_on_it() -> None:
    reasons: list[str] = []
    async with admin(reasons) as (url, _):
        assert await get(url + "/ready") == (200, '{"ready": true, "reasons": []}')
        reasons.append("no model")
        assert await get(url + "/ready") == (503, '{"ready": false, "reasons": ["no model"]}')
        assert (await get(url + "/live"))[0] == 200
        assert await get(url + "/debug/state") == (200, '{"belief": 42}')


async def test_metrics_show_the_registry_the_process_and_the_bus() -> None:
    async with admin([]) as (url, memory):
        text = (await get(url + "/metrics"))[1]
        assert 'kunserve_things_total{kind="x"} 3.0' in text
        assert "process_resident_memory_bytes" in text
        assert "kunserve_nats_connected 1.0" in text
        memory.stop()
        text = (await get(url + "/metrics"))[1]
        assert "kunserve_nats_connected 0.0" in text
        assert "kunserve_nats_disconnects_total 1.0" in text


async def test_a_probe_asks_and_says_when_nobody_answers() -> None:
    async def answer() -> dict[str, int]:
        return {"blocks": 3}

    async def silence() -> dict[str, int]:
        raise TimeoutError

    probes = {"engine": answer, "deaf": silence}
    server = AdminServer(admin_app(new_registry(), list, dict, probes), "127.0.0.1", 0)
    await server.start()
    try:
        url = f"http://127.0.0.1:{server.port}/debug"
        assert await get(f"{url}/engine") == (200, '{"blocks": 3}')
        status, text = await get(f"{url}/deaf")
        assert status == 503
        assert "deaf does not answer" in text
    finally:
        await server.stop()


async def test_a_taken_port_is_a_configuration_error() -> None:
    async with admin([]) as (url, _):
        port = int(url.rsplit(":", 1)[1])
        second = AdminServer(admin_app(new_registry(), list, dict), "127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            await second.start()
