"""Minutes of chaos: drops, restores, hangs, deaths, outages, in any order, while clients stream.

The seed is in the name of each test. `SOAK_SEED=4711 make soak ARGS='-k chaos'` plays it again.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

import pytest

from tests.integration.chaos import Clients, Event, ask_undisturbed, play, script
from tests.integration.clients import chat, completion
from tests.integration.conftest import StartCluster
from tests.integration.layouts import Operator

pytestmark = pytest.mark.soak

SEED = int(os.environ.get("SOAK_SEED") or secrets.randbelow(10_000))
NUM_STEPS = 30
NUM_CLIENTS = 10
SETTINGS = {
    "KUNSERVE_DEVICE_MEMORY": "4MiB",
    "KUNSERVE_CHUNK_BYTES": "64KiB",
    "KUNSERVE_MAX_MODEL_LEN": "2048",
    "KUNSERVE_MAX_NUM_BATCHED_TOKENS": "64",
    "KUNSERVE_LINK_BANDWIDTH": "3MB",
    "KUNSERVE_ACK_TIMEOUT_SECONDS": "5",
}
WORDS = "the quick brown fox jumps over the lazy dog, "
REQUESTS = [
    *(completion(number, 20 + 37 * number % 300) for number in range(12)),
    *(chat(number, 150, logprobs=True) for number in range(12, 15)),
    *(completion(number, 100, prompt=f"{number} {WORDS * 20}") for number in range(15, 20)),
    completion(20, 200, repetition_penalty=1.2, frequency_penalty=0.4),
    completion(21, 200, stop="th", min_tokens=40),
]
LAYOUTS = {Event.DROP: 4, Event.RESTORE: 3}
TROUBLE = {Event.PAUSE_WORKER: 1, Event.KILL_PLANNER: 1, Event.KILL_NATS: 1}
DEATH = {Event.KILL_WORKER: 2}


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("num_workers", "events"),
    [
        pytest.param(2, LAYOUTS, id="two-drops"),
        pytest.param(4, LAYOUTS, id="four-drops"),
        pytest.param(2, LAYOUTS | TROUBLE, id="two-trouble"),
        pytest.param(3, LAYOUTS | DEATH, id="three-deaths"),
        pytest.param(4, LAYOUTS | TROUBLE | DEATH, id="four-all"),
    ],
)
@pytest.mark.parametrize("seed", [SEED], ids=str)
async def test_streams_survive_chaos(
    start_cluster: StartCluster,
    tiny_settings: Mapping[str, str],
    num_workers: int,
    events: Mapping[Event, int],
    seed: int,
) -> None:
    cluster = await start_cluster(workers=num_workers, settings={**tiny_settings, **SETTINGS})
    operator = Operator(cluster)
    undisturbed = await ask_undisturbed(cluster.url, REQUESTS)
    async with Clients(cluster.url, undisturbed, seed, NUM_CLIENTS) as clients:
        for step in script(seed, NUM_STEPS, num_workers, events):
            print(await play(step, cluster, operator))  # noqa: T201 -- shown if the test fails
            assert clients.wrong == []
        await clients.finish()
        assert clients.wrong == []
    assert clients.num_answers > NUM_CLIENTS
    await operator.make_whole()
    await operator.check()
