"""Calls of libraries that may never return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def call_within(
    seconds: float, call: Callable[[], Result], discard: Callable[[Result], object]
) -> Result:
    """What `call` gives, made in a thread of its own.

    A call that is late is left alone; what it gives in the end goes to `discard`.

    Raises:
        TimeoutError: it has not returned in time.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # handed to whoever waits for it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="may hang", daemon=True).start()
    try:
        return future.result(max(seconds, 0.0))
    except TimeoutError:
        future.add_done_callback(lambda late: late.exception() or discard(late.result()))
        raise
