"""What one round of the engine thread brings, in the order in which it happened.

A request that is handed over has its last tokens here before, one that is adopted has its first
ones after. So a round is told in parts, in each of which the events are older than the items:

    items | events items | events items
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.worker.pipeline.events import GroupEvent
from shared.messages import TokenItem

#: Events, and the items that came after them.
Part = tuple[list[GroupEvent], list[TokenItem]]


class News:
    """Collects one round; one part at least, which may be empty."""

    def __init__(self) -> None:
        self._parts: list[Part] = [([], [])]

    @property
    def parts(self) -> Sequence[Part]:
        """What came so far, oldest first."""
        return self._parts

    @property
    def is_empty(self) -> bool:
        """True if nothing came."""
        return self._parts == [([], [])]

    @property
    def has_items(self) -> bool:
        """True if there is something to tell routers."""
        return any(items for _, items in self._parts)

    def add(self, items: Iterable[TokenItem], events: Iterable[GroupEvent]) -> None:
        """Take what one step of the round brought; its events are older than its items."""
        new_events = list(events)
        if new_events and self._parts[-1][1]:
            self._parts.append(([], []))
        self._parts[-1][0].extend(new_events)
        self._parts[-1][1].extend(items)
