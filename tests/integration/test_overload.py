"""A cluster under pressure drops layers by itself, and takes them back when the pressure is gone.

Nobody orders anything here. What clients read is what they would have read anyway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from services.planner.settings import PlannerSettings, Policy
from tests.conftest import eventually
from tests.integration.clients import Streams, Undisturbed, completion
from tests.integration.harness import Cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {
    "KUNSERVE_POLICY": Policy.DROP.value,
    "KUNSERVE_DEVICE_MEMORY": "4MiB",
    "KUNSERVE_CHUNK_BYTES": "64KiB",
    "KUNSERVE_MAX_MODEL_LEN": "2048",
    "KUNSERVE_MIN_DWELL_SECONDS": "1",
}
#: Longer than the overload, a drop, a restore and the dwell time together on a busy machine.
DEADLINE_SECONDS = 90.0
PROMPT = "the quick brown fox jumps over the lazy dog, " * 20
#: Together they need several times the KV of both workers; a few of them need little of it.
BODIES = [completion(number, 200, prompt=f"{number}: {PROMPT}") for number in range(16)]
FEW = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    async with Cluster(directory, workers=2, settings={**tiny_settings, **SETTINGS}) as cluster:
        yield cluster


async def transitions(cluster: Cluster) -> list[dict[str, Any]]:
    view = await cluster.cluster()
    states = ("dropping", "restoring")
    return [each for each in view["transitions"] if each["state"] in states]


async def test_pressure_alone_drops_and_calm_alone_restores(cluster: Cluster) -> None:
    undisturbed = Undisturbed()
    for start in range(0, len(BODIES), FEW):
        await undisturbed.ask(cluster.url, BODIES[start : start + FEW])
    assert await transitions(cluster) == [], "nothing drops without pressure"

    async with Streams(cluster.urls, BODIES) as streams:

        async def is_dropped() -> bool:
            view = await cluster.cluster()
            return [len(group["members"]) for group in view["groups"]] == [2]

        await eventually(is_dropped, DEADLINE_SECONDS)
        await undisturbed.check_ends(streams)

    async def is_whole() -> bool:
        told = await transitions(cluster)
        return (await cluster.cluster())["state"] == "stable" and len(told) > 1

    await eventually(is_whole, DEADLINE_SECONDS)
    told = await transitions(cluster)
    assert [each["state"] for each in told[::2]] == ["dropping"] * (len(told) // 2), told
    assert [each["state"] for each in told[1::2]] == ["restoring"] * (len(told) // 2), told
    for transition in told:
        assert transition["result"] == "applied", told
        assert "demand" in transition["cause"]
        assert transition["phase_seconds"].keys() == {"prepare", "commit", "exchange"}

    async def is_at_rest() -> bool:
        return (await cluster.cluster())["decision"]["rule"] in ("settled", "unchanged")

    await eventually(is_at_rest, DEADLINE_SECONDS)


async def test_dropping_under_pressure_is_the_default() -> None:
    assert PlannerSettings().policy is Policy.DROP
