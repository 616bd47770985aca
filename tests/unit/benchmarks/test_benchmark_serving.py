"""The comparison's tables: ratios to the first server, and servers that failed stay visible."""

from __future__ import annotations

from pathlib import Path

from benchmarks.metrics import LoadSummary, RequestRecord, summarise
from benchmarks.servers import ServerAdapter
from benchmarks.serving import ServerResult, ratio_table, tables


def load(tokens_per_second: float) -> LoadSummary:
    step = 1 / tokens_per_second
    times = tuple(step * number for number in range(1, 11))
    return summarise([RequestRecord(0, 0.0, times, 10, 8)])


def result(name: str, rates: list[float], single_rate: float | None = None) -> ServerResult:
    adapter = ServerAdapter(name, Path("python"), name, (name, "--port", "{port}"), "/ready")
    measured = ServerResult(adapter, "1.0", 0.0, rounds=[load(rate) for rate in rates])
    measured.single = load(single_rate) if single_rate else None
    return measured


def test_the_median_round_is_one_that_was_measured() -> None:
    median = result("a", [30.0, 10.0, 20.0, 40.0]).median_round
    assert median is not None
    assert round(median.output_tokens_per_second) == 20


def test_ratios_are_the_first_servers_over_the_others() -> None:
    rows = ratio_table([result("ours", [50.0], 20.0), result("theirs", [20.0], 10.0)]).rows
    assert [row[:3] for row in rows] == [
        ["ours", "1.00 x", "1.00 x"],
        ["theirs", "2.50 x", "2.00 x"],
    ]


def test_a_server_that_was_not_measured_is_shown_without_figures() -> None:
    text = "\n".join(tables([result("ours", [50.0], 20.0), result("broken", [])]))
    assert "broken" in text
    assert "nan" not in text


def test_the_port_is_filled_into_the_command() -> None:
    assert result("a", []).adapter.command_line(8123) == ["a", "--port", "8123"]
