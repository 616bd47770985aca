"""Runs a `kunserve` command in which a signal is sent the moment a worker gets to a named state.

    python -m tests.integration.fault_points ORDER worker --worker-id worker-0 ...

Workers raise the audit event `kunserve.member_state` whenever they enter a state. ORDER is a file
that need not exist: while it holds `SETTLING 1234 9`, signal 9 goes to process 1234 when SETTLING
is entered, once. The process may be the worker itself, or any other of the cluster.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services import cli

EVENT = "kunserve.member_state"


def write_order(path: Path, state: str, pid: int, signal_number: int) -> None:
    """Have the signal sent at the next entry of `state`; what was ordered before is void."""
    draft = path.with_suffix(".draft")
    draft.write_text(f"{state} {pid} {signal_number}")
    draft.rename(path)


class _FaultPoints:
    def __init__(self, order: Path) -> None:
        self._order = order

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != EVENT or not self._order.exists():
            return
        state, pid, signal_number = self._order.read_text().split()
        if arguments == (state,):
            self._order.unlink()
            os.kill(int(pid), int(signal_number))


if __name__ == "__main__":
    sys.addaudithook(_FaultPoints(Path(sys.argv.pop(1))))
    sys.exit(cli.main())
