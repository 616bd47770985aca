"""`kunserve status`: what `GET /cluster` says, as tables or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from services.cluster.client_settings import ClientSettings
from services.cluster.http import ask
from services.cluster.program import Program
from services.cluster.table import render_bytes, render_table
from shared.errors import KunserveError

#: Of the past transitions, as many are shown as fit a glance.
_NUM_TRANSITIONS = 5


def render_cluster(cluster: Mapping[str, Any], now: float) -> str:
    """A `GET /cluster` answer for people; `now` is wall clock."""
    layout = f"layout {cluster['state']}, term {cluster['term']}, epoch {cluster['epoch']}\n"
    tables = [
        layout + _decision_line(cluster["decision"], now),
        render_table(
            ("GROUP", "LEADER", "STAGES", "RUNNING", "WAITING", "KV BLOCKS"),
            [_group_row(group) for group in cluster["groups"]],
        ),
        render_table(
            ("WORKER", "STATE", "DEVICE", "LAYERS", "MEMORY", "WEIGHTS", "KV", "FREE"),
            [_worker_row(worker) for worker in cluster["workers"]],
        ),
    ]
    if cluster["transitions"]:
        shown = cluster["transitions"][-_NUM_TRANSITIONS:]
        rows = [_transition_row(transition, now) for transition in reversed(shown)]
        tables.append(render_table(("AGO", "CHANGE", "PHASES", "RESULT", "CAUSE"), rows))
    return "\n".join(tables)


def _decision_line(decision: Mapping[str, Any] | None, now: float) -> str:
    """What the planner decided last; nothing before its first decision."""
    if decision is None:
        return ""
    what = decision["rule"].replace("_", " ")
    detail = f": {decision['detail']}" if decision["detail"] else ""
    return (
        f"planner {decision['action']}, {what}, {_age(decision['decided_at'], now)} ago{detail}\n"
    )


def _transition_row(transition: Mapping[str, Any], now: float) -> list[str]:
    phases = [f"{phase} {spent:.3g} s" for phase, spent in transition["phase_seconds"].items()]
    return [
        _age(transition["started_at"], now),
        transition["state"],
        ", ".join(phases),
        transition["result"],
        transition["cause"],
    ]


def _age(moment: float, now: float) -> str:
    """How long ago a moment was, in one unit."""
    seconds = max(0.0, now - moment)
    for unit, limit, size in (("s", 120, 1), ("min", 7200, 60), ("h", 172800, 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _group_row(group: Mapping[str, Any]) -> list[str]:
    stages = [f"{member['worker']} {_spans([member['layers']])}" for member in group["members"]]
    used, total = group["kv_blocks_used"], group["kv_blocks_total"]
    share = f" ({used / total:.0%})" if total else ""
    waiting = group["kv_blocks_waiting"]
    queued = f" + {waiting} queued" if waiting else ""
    return [
        group["id"],
        group["leader"],
        " > ".join(stages),
        str(group["requests_running"]),
        str(group["requests_waiting"]),
        f"{used}/{total}{share}{queued}",
    ]


def _worker_row(worker: Mapping[str, Any]) -> list[str]:
    sizes = ("memory_bytes", "weight_bytes", "kv_bytes", "free_bytes")
    return [
        worker["id"],
        worker["state"],
        worker["device"],
        _spans(worker["layers"]),
        *(render_bytes(worker[size]) for size in sizes),
    ]


def _spans(spans: Sequence[Sequence[int]]) -> str:
    return " ".join(f"[{start}, {end})" for start, end in spans)


def _add_positionals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as it is")


def _run(settings: ClientSettings, arguments: argparse.Namespace) -> int:
    answer = ask(
        f"{settings.url.rstrip('/')}/cluster",
        timeout_seconds=settings.timeout_seconds,
        bearer=settings.admin_key or settings.api_key,
    )
    if answer.status != 200:
        raise KunserveError(f"{settings.url} does not show its cluster: {answer.problem}")
    if arguments.json:
        sys.stdout.write(f"{json.dumps(answer.body, indent=2)}\n")
        return 0
    try:
        sys.stdout.write(render_cluster(answer.body, time.time()))
    except (KeyError, TypeError, ValueError) as error:
        raise KunserveError(
            f"{settings.url} is no KunServe router: /cluster lacks {error}"
        ) from error
    return 0


STATUS = Program(
    ClientSettings,
    _run,
    "kunserve status\n  kunserve status --json | jq .groups",
    add_positionals=_add_positionals,
)
