"""The frame of every benchmark command: signals, errors, exit codes as `kunserve` has them."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine

from shared.errors import ConfigError, KunserveError
from shared.logging import LogFormat, configure_logging


def run_command(main: Coroutine[None, None, None]) -> int:
    """Run `main` to its end; SIGINT and SIGTERM cancel it, so that what it started is stopped."""
    configure_logging("bench", "", LogFormat.TEXT, "warning")
    try:
        asyncio.run(_cancel_on_sigterm(main))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KunserveError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 1
    return 0


async def _cancel_on_sigterm(main: Coroutine[None, None, None]) -> None:
    task = asyncio.ensure_future(main)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task
