"""Drops and restores that operators ask for, waiting for the planner's turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from shared.messages import AdminReply, AdminRequest

#: Longest wait for an answer; a router waits a little longer.
ANSWER_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class _Wish:
    request: AdminRequest
    answer: asyncio.Future[AdminReply]


class Wishes:
    """A queue of wishes, each of which gets one answer.

    Args:
        wake: called when there is a new one.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[_Wish] = deque()

    async def ask(self, request: AdminRequest) -> AdminReply:
        """Have a wish decided, or learn that nobody did in time."""
        wish = _Wish(request, asyncio.get_running_loop().create_future())
        self._waiting.append(wish)
        self._wake()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await wish.answer
        except TimeoutError:
            return AdminReply(error="the planner could not decide in time: try again in a moment")
        finally:
            if wish in self._waiting:
                self._waiting.remove(wish)

    @property
    def first(self) -> AdminRequest | None:
        """The oldest wish without an answer."""
        return self._waiting[0].request if self._waiting else None

    def answer_first(self, reply: AdminReply) -> None:
        """Answer the oldest wish, if whoever asked still waits."""
        wish = self._waiting.popleft()
        if not wish.answer.done():
            wish.answer.set_result(reply)
        if self._waiting:
            self._wake()
