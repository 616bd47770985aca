"""What the model is given of a batch, also of one that goes on from tokens nobody knows yet."""

from __future__ import annotations

import pytest

from services.worker.batch_io import batch_input
from services.worker.engine.outputs import ScheduledRequest, SchedulerOutput
from services.worker.engine.request import Request
from services.worker.model.batch import UNKNOWN_TOKEN
from shared.sampling import SamplingParams

EOS = 90


def make_request(num_output_tokens: int = 0, **sampling: object) -> Request:
    return Request(
        request_id="r",
        router_id="router",
        attempt=0,
        prompt_token_ids=[10, 11, 12, 13],
        output_token_ids=[20, 21, 22][:num_output_tokens],
        sampling=SamplingParams.model_validate({"max_tokens": 8, **sampling}),
        arrival_seconds=0.0,
        eos_token_ids=frozenset({EOS}),
        block_table=[3, 1],
    )


def batch(*items: tuple[Request, int, int, bool]) -> SchedulerOutput:
    return SchedulerOutput(1, tuple(ScheduledRequest(*item) for item in items))


def test_known_tokens_are_given_and_rows_are_those_that_get_a_token() -> None:
    chunk, decode = make_request(), make_request(2)
    slices, rows = batch_input(batch((decode, 5, 1, True), (chunk, 1, 2, False)))
    assert [(s.token_ids, s.start, s.wants_token, s.source_row) for s in slices] == [
        ([21], 5, True, None),
        ([11, 12], 1, False, None),
    ]
    assert [s.block_table for s in slices] == [[3, 1], [3, 1]]
    (row,) = rows
    assert (row.position, row.output_token_ids, row.source_row) == (6, [20, 21], None)


def test_an_unknown_token_comes_from_its_row_of_the_batch_before() -> None:
    first, chunk, second, new = (make_request(1), make_request(), make_request(), make_request())
    before = batch((first, 4, 1, True), (chunk, 0, 2, False), (second, 0, 4, True))
    slices, rows = batch_input(
        batch((second, 4, 1, True), (first, 5, 1, True), (chunk, 2, 2, True), (new, 0, 4, True)),
        before,
    )
    assert [(s.token_ids, s.start, s.source_row) for s in slices] == [
        ([UNKNOWN_TOKEN], 4, 1),
        ([UNKNOWN_TOKEN], 5, 0),
        ([12, 13], 2, None),
        ([10, 11, 12, 13], 0, None),
    ]
    assert [(row.position, row.output_token_ids, row.source_row) for row in rows] == [
        (5, [], 1),
        (6, [20], 0),
        (4, [], None),
        (4, [], None),
    ]


@pytest.mark.parametrize(("min_tokens", "forbidden"), [(1, ()), (2, (EOS,)), (3, (EOS,))])
def test_an_unknown_token_counts_for_what_is_forbidden(
    min_tokens: int, forbidden: tuple[int, ...]
) -> None:
    request = make_request(min_tokens=min_tokens)
    before = batch((request, 0, 4, True))
    _, (row,) = batch_input(batch((request, 4, 1, True)), before)
    assert row.forbidden_token_ids == forbidden


def test_an_unknown_token_that_nobody_samples_is_a_fault() -> None:
    request = make_request()
    with pytest.raises(KeyError):
        batch_input(batch((request, 4, 1, True)), batch((make_request(), 0, 4, True)))
