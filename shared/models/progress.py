"""Shows on stderr how far a conversion is: a bar on a terminal, a line per quarter elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TextIO

ProgressCallback = Callable[[int, int], None]
"""Called with `(done_bytes, total_bytes)`; the last call has `done_bytes == total_bytes`."""

_BAR_WIDTH = 30
_QUARTER_PERCENT = 25


class ProgressReporter:
    """A `ProgressCallback` that writes to `stream`; `label` says what is being done."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream = stream
        self._label = label
        self._is_terminal = stream.isatty()
        self._shown_percent = -1

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        percent = 100 * done_bytes // total_bytes if total_bytes else 100
        if not self._is_terminal:
            percent -= percent % _QUARTER_PERCENT
        if percent <= self._shown_percent:
            return
        self._shown_percent = percent
        if self._is_terminal:
            self._draw_bar(percent, total_bytes)
        elif percent > 0:
            self._stream.write(f"{self._label}: {percent} % of {total_bytes / 1e6:.0f} MB\n")
        self._stream.flush()

    def _draw_bar(self, percent: int, total_bytes: int) -> None:
        filled = _BAR_WIDTH * percent // 100
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        end = "\n" if percent == 100 else ""
        self._stream.write(
            f"\r{self._label} [{bar}] {percent:3d} % of {total_bytes / 1e6:.0f} MB{end}"
        )
