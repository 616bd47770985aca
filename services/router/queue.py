"""Requests that wait for a worker: first come first served, bounded in requests and in tokens.

Only the head tries; the others wait behind it, so that nobody overtakes. A request whose worker
died stands in front of the new ones and is never refused: its client already has tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque

from services.router.errors import OverloadedError


class Ticket:
    """A place in the queue."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.news = asyncio.Event()


class WaitingQueue:
    """The tickets in order."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def num_tokens(self) -> int:
        return sum(ticket.num_tokens for ticket in self._tickets)

    def enter(self, num_tokens: int, *, is_replay: bool) -> Ticket:
        """Take a place; raises OverloadedError where the queue is full."""
        ticket = Ticket(num_tokens)
        if is_replay:
            self._tickets.appendleft(ticket)
            return ticket
        if len(self._tickets) >= self._max_requests:
            raise OverloadedError(
                f"all workers are busy and {len(self._tickets)} requests are waiting already"
            )
        if self._tickets and self.num_tokens + num_tokens > self._max_tokens:
            raise OverloadedError(
                f"all workers are busy and prompts of {self.num_tokens} tokens are waiting already"
            )
        self._tickets.append(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the place up and let the next one try."""
        self._tickets.remove(ticket)
        self.wake_head()

    def is_head(self, ticket: Ticket) -> bool:
        return self._tickets[0] is ticket

    def wake_head(self) -> None:
        """Something changed: the head may try again."""
        if self._tickets:
            self._tickets[0].news.set()
