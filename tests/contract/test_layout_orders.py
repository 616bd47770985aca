"""`POST /admin/drop` and `/admin/restore`, and the commands that send them, with a real planner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from services import cli
from shared.bus.memory import MemoryBus
from tests.conftest import eventually
from tests.planner_support import PaperWorker, plan_is, read_plan, running_planner
from tests.router_support import Cluster, running_cluster


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A router, a planner, and the workers a and b."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_router(admin_key="root")
        planner_bus = MemoryBus(cluster.server, "planner")
        a = PaperWorker(cluster.bus, "default", "a")
        b = PaperWorker(cluster.bus, "default", "b")
        async with running_planner(planner_bus, "default"), a.living(), b.living():
            await eventually(plan_is(cluster.bus, "default", "a", "b"))
            yield cluster
        await planner_bus.close()


async def order(cluster: Cluster, action: str, body: dict[str, Any]) -> tuple[int, Any]:
    headers = {"Authorization": "Bearer root"}
    url = f"{cluster.url}/admin/{action}"
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(url, json=body) as response,
    ):
        return response.status, await response.json()


async def num_groups(cluster: Cluster) -> int:
    plan = await read_plan(cluster.bus, "default")
    return len(plan.groups) if plan is not None and plan.change is None else 0


async def test_drop_and_restore_answer_with_the_plan(cluster: Cluster) -> None:
    status, answer = await order(cluster, "drop", {"dry_run": True})
    assert status == 200
    plan = answer["plan"]
    assert plan["dry_run"]
    assert plan["state"] == "dropping"
    (group,) = plan["groups"]
    assert [member["worker"] for member in group["members"]] == ["a", "b"]
    assert [member["layers"] for member in group["members"]] == [[0, 2], [2, 4]]
    assert await num_groups(cluster) == 2

    status, answer = await order(cluster, "drop", {"workers": ["a", "b"], "hold_seconds": 3600})
    assert status == 200
    assert answer["plan"]["hold"]["kind"] == "no_restore"

    async def is_dropped() -> bool:
        return await num_groups(cluster) == 1

    await eventually(is_dropped)
    status, answer = await order(cluster, "restore", {})
    assert (status, answer["plan"]["state"]) == (200, "restoring")


@pytest.mark.parametrize(
    ("action", "body", "expected"),
    [
        ("restore", {}, "nothing can be restored"),
        ("drop", {"workers": ["z"]}, "no group has a worker z"),
        ("drop", {"workers": "a"}, "workers"),
        ("drop", {"hold_seconds": -1}, "hold_seconds"),
        ("drop", {"dry_run": "yes"}, "dry_run"),
    ],
)
async def test_a_bad_order_is_told(
    cluster: Cluster, action: str, body: dict[str, Any], expected: str
) -> None:
    status, answer = await order(cluster, action, body)
    assert status == 400
    assert expected in answer["error"]["message"]


async def test_the_commands(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    async def run(*words: str) -> int:
        options = ("--url", cluster.url, "--admin-key", "root")
        return await asyncio.to_thread(cli.main, [*words, *options])

    capsys.readouterr()
    assert await run("drop", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "dropping (would be)" in shown
    assert "a [0, 2) > b [2, 4)" in shown
    assert await run("restore", "a") == 1
    assert "nothing can be restored" in capsys.readouterr().err
    assert await run("drop", "a", "b", "--hold-seconds", "60") == 0
    assert "under way" in capsys.readouterr().out


def test_a_hold_that_is_no_time_is_bad_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["drop", "--hold-seconds", "long"]) == 2
    assert "seconds" in capsys.readouterr().err
