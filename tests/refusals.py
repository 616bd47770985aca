"""Fakes of drivers whose calls are counted, and refused when a test wants that."""

from __future__ import annotations

from collections import Counter

from services.worker.memory.errors import DeviceMemoryError


class RefusableCalls:
    """`fail` makes a later call be refused; `calls` counts them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._failures: dict[str, int] = {}

    def fail(self, name: str, after: int = 0) -> None:
        """Refuse one call of `name`, once `after` more of them have succeeded."""
        self._failures[name] = after

    def note(self, name: str) -> None:
        """Count a call, and refuse it if that was asked for."""
        self.calls[name] += 1
        if name in self._failures:
            self._failures[name] -= 1
            if self._failures[name] < 0:
                del self._failures[name]
                raise DeviceMemoryError(f"{name}: refused by the test")
