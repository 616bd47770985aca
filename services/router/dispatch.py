"""Which group serves a request: pure decisions over plain data.

A load report is old when it arrives and says nothing of what is on its way. So the router books
every request it sends (`DispatchLedger`) and takes a booking out when a report arrives that
includes it (Llumnix, "instant and accurate load"). Free KV, not a count of requests, is the load.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What is known of a group that may be sent requests."""

    group_id: str
    leader: str
    free_blocks: int  # not in use by running requests
    waiting_blocks: int  # needed by requests that wait at the leader
    booked_blocks: int  # needed by requests sent since the report

    @property
    def spare_blocks(self) -> int:
        """KV blocks left when everything known is running; negative under pressure."""
        return self.free_blocks - self.waiting_blocks - self.booked_blocks


def rank_groups(groups: Iterable[GroupLoad], salt: str) -> list[GroupLoad]:
    """The groups, the one with the most spare KV first.

    Ties are broken by a hash of `salt`, which differs per router and request: routers with the
    same picture do not all pick the same group, and one router rotates.
    """
    return sorted(
        groups,
        key=lambda group: (
            -group.spare_blocks,
            zlib.crc32(f"{salt} {group.group_id}".encode()),
        ),
    )


def blocks_for(num_tokens: int, block_size: int) -> int:
    """KV blocks that `num_tokens` tokens and the next one need."""
    return num_tokens // block_size + 1


@dataclass(frozen=True, slots=True)
class _Booking:
    dispatch_number: int
    num_blocks: int


class DispatchLedger:
    """The requests this router sent to one worker that its load reports do not include yet."""

    def __init__(self) -> None:
        self._last_number = 0
        self._bookings: deque[_Booking] = deque()

    @property
    def booked_blocks(self) -> int:
        return sum(booking.num_blocks for booking in self._bookings)

    def book(self, num_blocks: int) -> int:
        """Enter a request that is about to be sent; returns its dispatch number."""
        self._last_number += 1
        self._bookings.append(_Booking(self._last_number, num_blocks))
        return self._last_number

    def cancel(self, dispatch_number: int) -> None:
        """Take out a request that the worker did not accept."""
        self._bookings = deque(
            booking for booking in self._bookings if booking.dispatch_number != dispatch_number
        )

    def settle(self, received: int) -> None:
        """A report arrived that includes everything up to `received`."""
        while self._bookings and self._bookings[0].dispatch_number <= received:
            self._bookings.popleft()

    def clear(self) -> None:
        """The worker started anew: it knows of no request. Numbers go on rising."""
        self._bookings.clear()
