"""Run a command that dies with the process that started it, however that one ends.

A launcher: `python parent_death.py <pid of the parent> <signal> <command> ...` asks Linux to send
the signal to this process when its parent ends, then becomes the command. A parent killed with
SIGKILL so leaves no orphan. Where the system cannot do it (not Linux) the command merely runs.

This file imports nothing of KunServe: it is run by path, in an isolated interpreter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def dies_with_parent(command: Sequence[str], signal_number: int = signal.SIGTERM) -> list[str]:
    """The command line that runs `command` tied to the calling process.

    Start it from the main thread: Linux watches the thread that started the child.
    """
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(signal_number))]
    return [*launcher, *command]


def _main(parent: int, signal_number: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent:
            raise SystemExit(1)  # the parent ended before we asked
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
