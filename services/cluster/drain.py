"""`kunserve drain WORKER`: asks the planner, through a router, to take a worker out of service."""

from __future__ import annotations

import argparse
import sys

from services.cluster.client_settings import ClientSettings
from services.cluster.http import ask
from services.cluster.program import Program
from shared.errors import KunserveError


def _add_positionals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", help="id of the worker, as `kunserve status` shows it")


def _run(settings: ClientSettings, arguments: argparse.Namespace) -> int:
    answer = ask(
        f"{settings.url.rstrip('/')}/admin/drain",
        timeout_seconds=settings.timeout_seconds,
        bearer=settings.admin_key,
        body={"worker": arguments.worker},
    )
    if answer.status != 200:
        raise KunserveError(f"{arguments.worker} is not drained: {answer.problem}")
    sys.stdout.write(f"{arguments.worker} takes no new requests and finishes those it runs\n")
    return 0


DRAIN = Program(
    ClientSettings,
    _run,
    "kunserve drain worker-0\n  kunserve drain worker-0 --url http://127.0.0.1:8000",
    usage="WORKER [OPTIONS]",
    add_positionals=_add_positionals,
)
