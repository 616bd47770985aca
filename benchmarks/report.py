"""How a benchmark reports: text on stdout, one JSON and one Markdown file."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def say(line: str = "") -> None:
    """Write one line to stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headers; the first column is left-aligned, the others right-aligned."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def render(self) -> str:
        """A Markdown table with padded columns, readable as plain text too."""
        columns = list(zip(self.headers, *self.rows, strict=True))
        widths = [max(len(cell) for cell in column) for column in columns]
        rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
        lines = [self._line(self.headers, widths), self._line(rule, widths)]
        lines += [self._line(row, widths) for row in self.rows]
        return "\n".join(lines)

    @staticmethod
    def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"


@dataclass(slots=True)
class Report:
    """A run's findings, shown as they come and saved at the end."""

    title: str
    paragraphs: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Show a paragraph and keep it for the Markdown file."""
        self.paragraphs.append(text)
        say(text)
        say()

    def save(self, path: Path, data: Mapping[str, Any]) -> None:
        """Write `path`.json with `data` (paths become text) and `path`.md with the paragraphs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(data, default=str) + "\n")
        text = "\n\n".join([f"# {self.title}", *self.paragraphs])
        path.with_suffix(".md").write_text(text + "\n")
        say(f"written: {path.with_suffix('.json')} and {path.with_suffix('.md')}")


def milliseconds(seconds: float | None) -> str:
    """`12.3 ms` style without the unit; a dash for a missing value."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def seconds(value: float | None) -> str:
    """Seconds with two decimals; a dash for a missing value."""
    return "-" if value is None else f"{value:.2f}"
