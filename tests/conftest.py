"""What many tests need: a real nats-server, names of their own, waiting for a condition."""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from inspect import isawaitable
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from shared.embedded_nats import EmbeddedNats

if TYPE_CHECKING:
    from tests.tiny_models import TinyModels

DEADLINE_SECONDS = 20.0

#: Threads of torch wait for each other by spinning, which takes for ever where cores are busy; read
#: when torch is imported, here and in processes that tests start. A worker has none either.
os.environ["OMP_NUM_THREADS"] = "1"

Condition = Callable[[], object | Awaitable[object]]


async def eventually(condition: Condition, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Return when `condition()` is true; fail the test when it is not by the deadline."""
    ends_at = time.monotonic() + deadline_seconds
    while True:
        outcome = condition()
        if isawaitable(outcome):
            outcome = await outcome
        if outcome:
            return
        if time.monotonic() > ends_at:
            pytest.fail(f"condition does not hold after {deadline_seconds:g} s")
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_server() -> AsyncIterator[EmbeddedNats]:
    """One nats-server for the whole run; tests use names of their own (`unique`)."""
    async with EmbeddedNats() as server:
        yield server


@pytest_asyncio.fixture
async def own_nats_server() -> AsyncIterator[EmbeddedNats]:
    """A nats-server that the test may kill and restart."""
    async with EmbeddedNats() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Small random models of every served architecture."""
    from tests.tiny_models import TinyModels  # imports torch, which few tests need

    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    """A service that a test ran in this process set up logging to the stream of that test."""
    yield
    structlog.reset_defaults()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_cuda_device():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def _has_cuda_device() -> bool:
    """Ask the driver, without torch, whose import takes seconds that few runs need."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


@pytest.fixture
def unique() -> str:
    """A name no other test uses."""
    return f"t{secrets.token_hex(6)}"
