"""Every chunk has exactly one owner, whatever is assigned and released."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.memory.base import ChunkRun
from services.worker.memory.errors import LedgerIntegrityError, OutOfChunksError
from services.worker.memory.ledger import ChunkLedger, Owner, OwnerKind
from services.worker.memory.runs import coalesce

A = Owner(OwnerKind.WEIGHTS, "a")
B = Owner(OwnerKind.WEIGHTS, "b")
K = Owner(OwnerKind.KV, "0")


def _chunks(runs: list[ChunkRun]) -> list[int]:
    return [chunk for run in runs for chunk in range(run.first, run.first + run.count)]


def test_neighbours_are_one_run() -> None:
    ledger = ChunkLedger(8)
    assert ledger.assign(A, 3) == [ChunkRun(0, 3)]
    assert ledger.assign(B, 5) == [ChunkRun(3, 5)]


def test_the_tightest_run_that_fits_is_chosen() -> None:
    ledger = ChunkLedger(10)
    ledger.assign(A, 3)
    ledger.assign(B, 4)
    ledger.release_tail(A, 2)
    assert ledger.assign(K, 2) == [ChunkRun(1, 2)]
    assert ledger.assign(K, 3) == [ChunkRun(7, 3)]


def test_a_request_larger_than_any_run_takes_few_runs() -> None:
    ledger = ChunkLedger(10)
    ledger.assign(A, 4)
    ledger.assign(K, 2)
    ledger.release_tail(A, 4)
    assert ledger.assign(B, 6) == [ChunkRun(0, 4), ChunkRun(6, 2)]


def test_the_tail_is_what_came_last() -> None:
    ledger = ChunkLedger(6)
    ledger.assign(A, 2)
    ledger.assign(K, 2)
    ledger.release_tail(A, 2)
    ledger.assign(K, 4)
    assert ledger.owners[K][:2] == [2, 3]
    released = ledger.release_tail(K, 4)
    assert sorted(_chunks(released)) == [0, 1, 4, 5]
    assert ledger.owners[K] == [2, 3]


def test_more_than_is_free_is_refused_and_changes_nothing() -> None:
    ledger = ChunkLedger(4)
    ledger.assign(A, 3)
    with pytest.raises(OutOfChunksError, match="needs 2 chunks of memory, but only 1"):
        ledger.assign(K, 2)
    assert (ledger.num_free_chunks, ledger.count(K)) == (1, 0)
    ledger.check_integrity()


def test_an_owner_cannot_give_back_more_than_it_has() -> None:
    ledger = ChunkLedger(4)
    ledger.assign(A, 1)
    with pytest.raises(ValueError, match="has 1 chunks"):
        ledger.release_tail(A, 2)


def test_counts_by_kind() -> None:
    ledger = ChunkLedger(8)
    ledger.assign(A, 1)
    ledger.assign(B, 2)
    ledger.assign(K, 4)
    assert ledger.count_kind(OwnerKind.WEIGHTS) == 3
    assert ledger.count_kind(OwnerKind.KV) == 4
    assert ledger.num_free_chunks == 1


def test_a_chunk_with_two_owners_is_found() -> None:
    ledger = ChunkLedger(4)
    ledger.assign(A, 1)
    ledger.assign(B, 1)
    ledger.owners[B].append(0)
    with pytest.raises(LedgerIntegrityError, match="chunk 0 belongs to weights of a and"):
        ledger.check_integrity()


def test_a_lost_chunk_is_found() -> None:
    ledger = ChunkLedger(4)
    ledger.assign(A, 2)
    ledger.owners[A].pop()
    with pytest.raises(LedgerIntegrityError, match="chunk 1 is listed as weights of a"):
        ledger.check_integrity()


@given(st.lists(st.integers(0, 50), unique=True))
def test_coalescing_keeps_chunks_and_order(chunks: list[int]) -> None:
    runs = coalesce(chunks)
    assert _chunks(runs) == chunks
    ends = [run.first + run.count for run in runs]
    assert all(end != later.first for end, later in zip(ends, runs[1:], strict=False))


@given(
    st.integers(1, 24),
    st.lists(st.tuples(st.sampled_from([A, B, K]), st.integers(-12, 12)), max_size=40),
)
def test_any_history_keeps_the_books_right(
    num_chunks: int, history: list[tuple[Owner, int]]
) -> None:
    ledger = ChunkLedger(num_chunks)
    expected: dict[Owner, list[int]] = {A: [], B: [], K: []}
    for owner, change in history:
        if change >= 0:
            if change > ledger.num_free_chunks:
                continue
            expected[owner] += _chunks(ledger.assign(owner, change))
        else:
            count = min(-change, ledger.count(owner))
            released = _chunks(ledger.release_tail(owner, count))
            assert released == sorted(expected[owner][len(expected[owner]) - count :])
            del expected[owner][len(expected[owner]) - count :]
        ledger.check_integrity()
        assert dict(ledger.owners) == {o: chunks for o, chunks in expected.items() if chunks}
    used = sum(len(chunks) for chunks in expected.values())
    assert ledger.num_free_chunks == num_chunks - used
    assert sum(run.count for run in ledger.free_runs()) == ledger.num_free_chunks
    assert coalesce(_chunks(ledger.free_runs())) == ledger.free_runs()
