"""Requests to a router with stub workers, and what an undisturbed run of them is."""

from __future__ import annotations

from typing import Any

from tests.conftest import eventually
from tests.router_support import Cluster

COMPLETIONS = "/v1/completions"
NUM_TOKENS = 40


def body(seed: int = 1, **fields: Any) -> dict[str, Any]:
    return {"prompt": "go", "max_tokens": NUM_TOKENS, "seed": seed, **fields}


def expected(seed: int = 1, num_tokens: int = NUM_TOKENS) -> str:
    """What an undisturbed run answers."""
    spread = 0x7F - 0x21
    return "".join(
        chr(0x21 + (seed * 31 + position * 7919 + 17) % spread) for position in range(num_tokens)
    )


async def undisturbed(cluster: Cluster) -> None:
    """Nothing runs at any worker and nothing waits in any router."""
    await eventually(
        lambda: (
            all(len(service.context.generator) == 0 for service in cluster.services)
            and all(w.num_running == 0 for w in cluster.workers.values() if w.is_alive)
        )
    )
