"""Clusters for integration tests: one that cheap tests share, and one that a test may break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.harness import Cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two workers, one router; tests must leave its processes alone."""
    async with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


StartCluster = Callable[..., Awaitable[Cluster]]


@pytest_asyncio.fixture
async def start_cluster(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[StartCluster]:
    """`await start_cluster(workers=2, ...)`: a cluster of the test's own, to kill and restart."""
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Cluster:
            cluster = Cluster(tmp_path_factory.mktemp("cluster"), **options)
            return await stack.enter_async_context(cluster)

        yield start
