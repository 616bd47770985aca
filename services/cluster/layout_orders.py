"""`kunserve drop` and `kunserve restore`: ask the planner, through a router, for another layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from services.cluster.client_settings import ClientSettings
from services.cluster.http import ask
from services.cluster.program import Program
from services.cluster.table import render_table
from shared.errors import KunserveError


def render_plan(answer: Mapping[str, Any]) -> str:
    """What was ordered, or with `--dry-run` would be, as text."""
    plan = answer["plan"]
    what = "would be" if plan["dry_run"] else "under way"
    rows = [
        [
            group["id"],
            group["leader"],
            " > ".join(
                f"{member['worker']} [{member['layers'][0]}, {member['layers'][1]})"
                for member in group["members"]
            ),
        ]
        for group in plan["groups"]
    ]
    return (
        f"{plan['state']} ({what}), term {plan['term']}, epoch {plan['epoch']}: {plan['reason']}\n"
        + render_table(("GROUP", "LEADER", "STAGES"), rows)
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _add_positionals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workers",
        nargs="*",
        metavar="WORKER",
        help="ids of workers, as `kunserve status` shows them (default: the whole cluster)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")
    parser.add_argument(
        "--hold-seconds",
        type=_seconds,
        metavar="SECONDS",
        help="how long the planner must not undo it by itself",
    )


def _order(action: str, settings: ClientSettings, arguments: argparse.Namespace) -> int:
    answer = ask(
        f"{settings.url.rstrip('/')}/admin/{action}",
        timeout_seconds=settings.timeout_seconds,
        bearer=settings.admin_key,
        body={
            "workers": arguments.workers,
            "dry_run": arguments.dry_run,
            "hold_seconds": arguments.hold_seconds,
        },
    )
    if answer.status != 200:
        raise KunserveError(f"no {action}: {answer.problem}")
    try:
        sys.stdout.write(render_plan(answer.body))
    except (KeyError, TypeError) as error:
        raise KunserveError(
            f"{settings.url} is no KunServe router: /admin/{action} lacks {error}"
        ) from error
    return 0


def _drop(settings: ClientSettings, arguments: argparse.Namespace) -> int:
    return _order("drop", settings, arguments)


def _restore(settings: ClientSettings, arguments: argparse.Namespace) -> int:
    return _order("restore", settings, arguments)


DROP = Program(
    ClientSettings,
    _drop,
    "kunserve drop --dry-run\n  kunserve drop worker-0 worker-1 --hold-seconds 60",
    usage="[WORKER ...] [OPTIONS]",
    add_positionals=_add_positionals,
)
RESTORE = Program(
    ClientSettings,
    _restore,
    "kunserve restore\n  kunserve restore worker-0 --dry-run",
    usage="[WORKER ...] [OPTIONS]",
    add_positionals=_add_positionals,
)
