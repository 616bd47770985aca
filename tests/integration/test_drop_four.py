"""Four workers drop and restore in several rounds, together and in parts, while answers stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.clients import Streams, Undisturbed, chat, completion
from tests.integration.harness import Cluster
from tests.integration.layouts import Operator

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = {
    "KUNSERVE_DEVICE_MEMORY": "4MiB",
    "KUNSERVE_CHUNK_BYTES": "64KiB",
    "KUNSERVE_MAX_MODEL_LEN": "2048",
    "KUNSERVE_LINK_BANDWIDTH": "10MB",
}
SOME = 5
STREAMS: list[dict[str, Any]] = [
    *(completion(number, 1200) for number in range(6)),
    *(chat(number, 1200) for number in range(6, 9)),
    completion(9, 1200, repetition_penalty=1.2, logprobs=1),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Mapping[str, str]
) -> AsyncIterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    async with Cluster(directory, workers=4, settings={**tiny_settings, **SETTINGS}) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(cluster: Cluster) -> Undisturbed:
    undisturbed = Undisturbed()
    for start in range(0, len(STREAMS), 4):
        await undisturbed.ask(cluster.url, STREAMS[start : start + 4])
    return undisturbed


@pytest_asyncio.fixture(loop_scope="module")
async def operator(cluster: Cluster, undisturbed: Undisturbed) -> AsyncIterator[Operator]:
    """Of the idle cluster, all replicas; whatever a test does, it leaves nothing behind."""
    operator = Operator(cluster)
    yield operator
    await operator.check()
    await operator.make_whole()
    await operator.check()


Change = tuple[str, list[int]]  # an order, and the sizes of the groups that it leads to


@pytest.mark.parametrize(
    "changes",
    [
        [("drop", [2, 2]), ("drop", [4]), ("restore", [1, 1, 1, 1])],
        [("drop", [2, 2]), ("restore worker-0", [2, 1, 1]), ("drop worker-0", [2, 2])],
        [("drop worker-0 worker-1", [2, 1, 1]), ("drop worker-0 worker-2", [3, 1])],
        [("drop worker-3 worker-1 worker-2", [3, 1]), ("drop", [4]), ("restore", [1, 1, 1, 1])],
    ],
    ids=["pairs-four-whole", "half-restored", "third-joins", "fourth-joins"],
)
async def test_streams_live_through_rounds(
    cluster: Cluster, operator: Operator, undisturbed: Undisturbed, changes: list[Change]
) -> None:
    exchanged = await operator.exchanged_bytes()
    async with Streams(cluster.urls, STREAMS) as streams:
        for order, sizes in changes:
            await streams.wait_more(SOME)
            assert not all(stream.is_over for stream in streams.streams)
            await operator.carry_out(*order.split())
            # Of later changes it is not sure: those who run may be in groups that stay.
            assert await operator.exchanged_bytes() > exchanged
            members = [len(group["members"]) for group in await operator.groups()]
            assert sorted(members, reverse=True) == sizes
        await streams.wait_more(SOME)
        undisturbed.check(streams)
