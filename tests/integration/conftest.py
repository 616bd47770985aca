"""Clusters for integration tests: one that cheap tests share, and one that a test may break."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.integration.harness import Cluster


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """The built-in model, two workers, one router; tests must leave its processes alone."""
    async with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def sdk(shared_cluster: Cluster) -> AsyncIterator[AsyncOpenAI]:
    """The OpenAI SDK, pointed at the shared cluster."""
    async with AsyncOpenAI(
        base_url=f"{shared_cluster.url}/v1", api_key="none", timeout=60, max_retries=0
    ) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def http(shared_cluster: Cluster) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain HTTP client of the shared cluster."""
    async with aiohttp.ClientSession(
        shared_cluster.url, timeout=aiohttp.ClientTimeout(total=60)
    ) as session:
        yield session


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Settings of a cluster with a tiny model, which starts fast and has many tokens a second."""
    from tests.integration.tiny_model import WORKER_MEMORY, write_tiny_model  # imports torch

    directory: Path = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return {"KUNSERVE_MODEL": str(directory), "KUNSERVE_DEVICE_MEMORY": WORKER_MEMORY}


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
