"""What a user sees while a model is converted."""

from __future__ import annotations

import io

from shared.models import ProgressReporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_per_quarter() -> None:
    log = io.StringIO()
    report = ProgressReporter(log, "converting")
    for done in range(1001):
        report(done * 1_000_000, 1_000_000_000)
    assert log.getvalue().splitlines() == [
        f"converting: {percent} % of 1000 MB" for percent in (25, 50, 75, 100)
    ]


def test_a_terminal_gets_a_bar_that_ends_its_line() -> None:
    terminal = Terminal()
    report = ProgressReporter(terminal, "converting")
    for done in range(1001):
        report(done, 1000)
    frames = terminal.getvalue().split("\r")[1:]
    assert len(frames) == 101
    assert frames[-1].endswith("\n")
    assert "100 %" in frames[-1]
    assert "." in frames[50]
    assert "#" in frames[50]
