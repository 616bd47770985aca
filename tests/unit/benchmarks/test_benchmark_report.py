"""Tables are Markdown that is readable as text."""

from __future__ import annotations

import pytest

from benchmarks.report import Table, milliseconds, seconds


def test_a_table_is_aligned_markdown() -> None:
    table = Table(("server", "tok/s"), [("a", "1.0"), ("longer", "117.3")])
    assert table.render().splitlines() == [
        "| server | tok/s |",
        "| ------ | ----: |",
        "| a      |   1.0 |",
        "| longer | 117.3 |",
    ]


def test_a_row_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Table(("a", "b"), [("1",)]).render()


def test_missing_figures_are_dashes() -> None:
    assert (seconds(None), milliseconds(None)) == ("-", "-")
    assert (seconds(1.234), milliseconds(0.0123)) == ("1.23", "12.3")
