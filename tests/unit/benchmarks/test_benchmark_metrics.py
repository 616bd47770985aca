"""The figures of a load run mean what `benchmarks/metrics.py` says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.metrics import RequestRecord, distribution, percentile, summarise


def record(*chunk_times: float, sent_at: float = 0.0, tokens: int | None = None, error: str = ""):
    count = len(chunk_times) if tokens is None else tokens
    return RequestRecord(0, sent_at, tuple(chunk_times), count, 8, error)


def test_latencies_of_one_request() -> None:
    one = record(3.0, 3.5, 5.5, 6.0, sent_at=1.0)
    assert one.ttft_seconds == 2.0
    assert one.e2e_seconds == 5.0
    assert one.tpot_seconds == 1.0
    assert one.gaps_seconds == [0.5, 2.0, 0.5]


def test_tpot_counts_tokens_and_not_chunks() -> None:
    assert record(1.0, 2.0, tokens=5).tpot_seconds == 0.25


def test_a_single_token_has_no_tpot_and_no_gap() -> None:
    summary = summarise([record(1.0)])
    assert summary.tpot_seconds is None
    assert summary.max_gap_seconds is None
    assert summary.ttft_seconds is not None


def test_throughput_runs_from_the_first_send_to_the_last_chunk() -> None:
    summary = summarise([record(2.0, 3.0, sent_at=1.0), record(4.0, 6.0, sent_at=2.0)])
    assert summary.duration_seconds == 5.0
    assert summary.output_tokens_per_second == pytest.approx(4 / 5)


def test_failed_requests_are_counted_and_give_no_figures() -> None:
    summary = summarise([record(1.0, 2.0), record(50.0, error="HTTP 503"), record()])
    assert (summary.requests, summary.errors, summary.output_tokens) == (3, 2, 2)
    assert summary.ttft_seconds is not None
    assert summary.ttft_seconds.max == 1.0


def test_a_run_where_all_failed_has_no_distributions() -> None:
    summary = summarise([record(error="refused")])
    assert summary.errors == 1
    assert summary.output_tokens_per_second == 0.0
    assert summary.ttft_seconds is None


def test_largest_gap_is_taken_per_request() -> None:
    summary = summarise([record(1.0, 2.0, 2.5), record(1.0, 5.0, 5.1)])
    assert summary.max_gap_seconds is not None
    assert summary.max_gap_seconds.max == 4.0
    assert summary.max_gap_seconds.p50 == 2.5


@pytest.mark.parametrize(("percent", "value"), [(0, 10.0), (50, 25.0), (90, 37.0), (100, 40.0)])
def test_percentiles_are_linear_between_ranks(percent: float, value: float) -> None:
    assert percentile([10.0, 20.0, 30.0, 40.0], percent) == pytest.approx(value)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100), st.floats(0, 100))
def test_percentiles_rise_and_stay_inside_the_sample(
    values: list[float], first: float, second: float
) -> None:
    ordered = sorted(values)
    low, high = sorted((first, second))
    slack = 1e-9 * ordered[-1]
    assert percentile(ordered, low) <= percentile(ordered, high) + slack
    assert ordered[0] - slack <= percentile(ordered, low) <= ordered[-1] + slack


def test_percentiles_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="empty"):
        percentile([], 50)
    with pytest.raises(ValueError, match="outside"):
        percentile([1.0], 101)


def test_an_empty_sample_has_no_distribution() -> None:
    assert distribution([]) is None
