"""An operator of a test cluster: orders layouts, waits for them, looks into every engine."""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import pytest

from tests.conftest import eventually
from tests.integration.harness import Cluster

#: Longer than any change of the layout takes, also on a busy machine.
SETTLE_SECONDS = 60.0
MOST_TRIES = 5


class Operator:
    """Orders drops and restores of one cluster, and sees what comes of them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    # --- orders ----------------------------------------------------------------------------------

    async def ask(self, action: str, *workers: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        """What the router answers to an order."""
        body = {"workers": workers, **fields}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self._cluster.url}/admin/{action}", json=body) as response,
        ):
            return response.status, await response.json()

    async def order(self, action: str, *workers: str, **fields: Any) -> dict[str, Any]:
        """Give an order that must be accepted; returns the plan."""
        status, answer = await self.ask(action, *workers, **fields)
        assert status == 200, answer
        plan: dict[str, Any] = answer["plan"]
        return plan

    async def carry_out(self, action: str, *workers: str) -> None:
        """Give an order and wait until it has settled everywhere.

        On a machine so busy that a link's heartbeats come late, the cluster rightly falls back;
        then the order is given again.
        """
        for _ in range(MOST_TRIES):
            plan = await self.order(action, *workers)
            transition = await self.wait_settled(plan["epoch"])
            if transition["result"] == "applied":
                assert transition["phase_seconds"].keys() >= {"prepare", "commit", "exchange"}
                return
            assert re.match("fell back: .* is silent", transition["result"]), transition
        pytest.fail(f"fell back {MOST_TRIES} times: this machine is too busy")

    async def make_whole(self) -> None:
        """Restore whatever is dropped, after whatever is under way."""

        async def is_whole() -> bool:
            view = await self._cluster.cluster()
            if view is not None and view["state"] == "dropped":
                await self.ask("restore")
            return view is not None and view["state"] == "stable"

        await eventually(is_whole, SETTLE_SECONDS)

    # --- what is there ---------------------------------------------------------------------------

    async def groups(self) -> list[dict[str, Any]]:
        """The groups that serve."""
        view = await self._cluster.cluster()
        groups: list[dict[str, Any]] = view["groups"]
        return groups

    async def total(self, metric: str) -> float:
        """The sum of a metric over all workers."""
        return sum([await self._cluster.metric(w, metric) for w in self._cluster.workers])

    async def exchanged_bytes(self) -> float:
        """KV that workers have sent each other so far."""
        name, labels = "kunserve_link_bytes_total", {"class": "exchange", "direction": "sent"}
        return sum([await self._cluster.metric(w, name, labels) for w in self._cluster.workers])

    async def kv_block_bytes(self) -> int:
        """Bytes of one block of all layers."""
        state = await self._cluster.state(self._cluster.workers[0])
        num_bytes: int = state["worker"]["kv_block_bytes"]
        return num_bytes

    async def num_preemptions(self) -> float:
        """Requests that gave their KV away so far."""
        return await self.total("vllm:num_preemptions_total")

    # --- waiting ---------------------------------------------------------------------------------

    async def wait_settled(self, epoch: int) -> dict[str, Any]:
        """Return when the transition that the plan of `epoch` began is over: what is said of it."""
        found: list[dict[str, Any]] = []

        async def has_settled() -> bool:
            view = await self._cluster.cluster()
            found[:] = [each for each in view["transitions"] if each["epoch"] >= epoch]
            return bool(found) and view["state"] in ("stable", "dropped")

        await eventually(has_settled, SETTLE_SECONDS)
        return found[0]

    async def wait_exchanging(self, num_members: int) -> None:
        """Return when a drop is committed and KV travels, all of it not yet arrived."""

        async def is_exchanging() -> bool:
            view = await self._cluster.cluster()
            sizes = [len(group["members"]) for group in view["groups"]]
            assert not (view["state"] == "dropped" and num_members in sizes), "too late to see it"
            return view["state"] == "dropping" and num_members in sizes

        await eventually(is_exchanging, SETTLE_SECONDS)

    async def wait_load(self, figure: str, at_least: int) -> None:
        """Return when a figure of all groups together, as `GET /cluster` has it, is so high."""

        async def is_loaded() -> bool:
            return sum(group[figure] for group in await self.groups()) >= at_least

        await eventually(is_loaded, SETTLE_SECONDS)

    # --- what must hold --------------------------------------------------------------------------

    async def check(self) -> None:
        """Nothing is lost or left over in any worker of an idle cluster; `/cluster` is true."""
        await eventually(self._is_idle, SETTLE_SECONDS)
        await eventually(self._is_shown, SETTLE_SECONDS)

    async def _is_shown(self) -> bool:
        """Whether `GET /cluster` says what the engines say."""
        view = await self._cluster.cluster()
        engines = {
            worker.name: await self._cluster.probe(worker, "engine")
            for worker in self._cluster.workers
        }
        members = {m["worker"]: m["layers"] for group in view["groups"] for m in group["members"]}
        workers = {worker["id"]: worker for worker in view["workers"]}
        sums = ("weight_bytes", "kv_bytes", "free_bytes")
        return (
            all(
                group["kv_blocks_total"]
                == min(engines[member["worker"]]["blocks_total"] for member in group["members"])
                for group in view["groups"]
            )
            and members.keys() == workers.keys() == engines.keys()
            and all(workers[name]["layers"] == [members[name]] for name in members)
            and all(workers[name][part] == engines[name][part] for name in members for part in sums)
            and (view["state"] == "stable") == (len(view["groups"]) == len(members))
        )

    async def _is_idle(self) -> bool:
        """Whether no engine holds anything; fails where the books do not agree."""
        view = await self._cluster.cluster()
        leaders = {group["leader"] for group in view["groups"]}
        is_idle = all(group["requests_running"] == 0 for group in view["groups"])
        for worker in self._cluster.workers:
            engine = await self._cluster.probe(worker, "engine")
            assert engine["fault"] == "", f"{worker.name}: {engine['fault']}"
            used = engine["weight_bytes"] + engine["kv_bytes"] + engine["free_bytes"]
            assert used == engine["budget_bytes"]
            in_use = ("requests", "batches_in_flight", "blocks_used", "keys_held")
            is_idle &= not any(engine[name] for name in in_use)
            granted = 0 if worker.name in leaders else engine["blocks_total"]
            is_idle &= engine["blocks_granted"] == granted
        return is_idle
