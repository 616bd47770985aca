"""Requests in the order of their arrival; used for the waiting, the preempted and the running.

The scheduler's only order is first come, first served: it decides who is admitted next, who is
served first, and who must give way.
"""

from __future__ import annotations

from bisect import bisect_left, insort_right
from collections.abc import Iterator

from services.worker.engine.request import Request


def _arrival(request: Request) -> float:
    return request.arrival_seconds


class RequestQueue:
    """A list of requests sorted by `arrival_seconds`; equals keep the order they came in."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, position: int) -> Request:
        return self._requests[position]

    def add(self, request: Request) -> None:
        """Insert by arrival, behind those that arrived at the same time."""
        insort_right(self._requests, request, key=_arrival)

    def remove(self, request: Request) -> None:
        """Take `request` out; raises KeyError if it is not in."""
        position = bisect_left(self._requests, request.arrival_seconds, key=_arrival)
        while position < len(self._requests):
            if self._requests[position] is request:
                del self._requests[position]
                return
            position += 1
        raise KeyError(request.key)

    def after(self, request: Request) -> Iterator[Request]:
        """Those behind `request`, the last one first."""
        for candidate in reversed(self._requests):
            if candidate is request:
                return
            yield candidate
