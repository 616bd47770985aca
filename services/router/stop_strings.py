"""Stop strings in text that arrives in pieces.

Text is let through as soon as it cannot be the beginning of a stop string any more. The result
does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """What may be shown now, and the stop string that ended the text, if one did."""

    text: str
    matched: str | None = None


class StopStringScanner:
    """Scans one request's text for any of its stop strings."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        """`stops` are not empty strings."""
        self._stops = tuple(stops)
        self._include_in_output = include_in_output
        self._held = ""

    def push(self, text: str) -> Scan:
        """Take the next piece. After a match the scanner must not be used again."""
        held = self._held + text
        match = self._first_match(held)
        if match is not None:
            end, stop = match
            return Scan(held[: end if self._include_in_output else end - len(stop)], stop)
        keep = self._longest_beginning(held)
        self._held = held[len(held) - keep :]
        return Scan(held[: len(held) - keep])

    def pass_through(self, text: str) -> str:
        """Let a piece through unscanned (`min_tokens`): no match begins in it or before it."""
        text, self._held = self._held + text, ""
        return text

    def finish(self) -> str:
        """What was held back, when the text ends without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """End and stop string of the match that is complete first; the longest of several."""
        matches = [
            (start + len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(matches, key=lambda match: (match[0], -len(match[1])), default=None)

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            if text.endswith(tuple(stop[:length] for stop in self._stops if len(stop) > length)):
                return length
        return 0
