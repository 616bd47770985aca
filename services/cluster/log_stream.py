"""Brings the log lines of many processes onto one stream, so that a person can tell them apart.

worker-0 | 2026-11-23T05:00:00Z [info     ] ready          text: the child's name in front
{"ts": "2026-11-23T05:00:00Z", "service": "worker", …}      json: as it is, it names its origin
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TextIO

from shared.logging import LogFormat

_MAX_LINE_BYTES = 16 * 1024
_READ_BYTES = 64 * 1024
_TAIL_LINES = 20
_COLOURS = (36, 33, 32, 35, 34, 31)


class LogStream:
    """The stream that all lines go to."""

    def __init__(self, stream: TextIO, log_format: LogFormat, name_width: int) -> None:
        self._stream = stream
        self._format = log_format
        self._name_width = name_width
        self._is_terminal = stream.isatty()
        self._colours: dict[str, int] = {}

    def write(self, name: str, line: str) -> None:
        """Write one line of the process `name`."""
        prefix = "" if self._format is LogFormat.JSON else self._prefix(name)
        self._stream.write(f"{prefix}{line}\n")
        self._stream.flush()

    def _prefix(self, name: str) -> str:
        padded = f"{name:<{self._name_width}} |"
        if not self._is_terminal:
            return f"{padded} "
        colour = self._colours.setdefault(name, _COLOURS[len(self._colours) % len(_COLOURS)])
        return f"\x1b[{colour}m{padded}\x1b[0m "


class LogPump:
    """Copies one process's output, line by line, and remembers its end.

    A line longer than 16 KiB is broken up, so that no process can fill this one's memory.
    """

    def __init__(self, name: str, target: LogStream) -> None:
        self._name = name
        self._target = target
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)

    @property
    def last_line(self) -> str:
        """The last line that is not blank, or "" where there was none."""
        return next((line for line in reversed(self._tail) if line.strip()), "")

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Copy until the process and all that inherited its output have closed it."""
        rest = b""
        while chunk := await reader.read(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._write(line)
            while len(rest) > _MAX_LINE_BYTES:
                self._write(rest[:_MAX_LINE_BYTES])
                rest = rest[_MAX_LINE_BYTES:]
        if rest:
            self._write(rest)

    def _write(self, line: bytes) -> None:
        text = line.decode("utf-8", errors="replace").rstrip("\r")
        self._tail.append(text)
        self._target.write(self._name, text)
