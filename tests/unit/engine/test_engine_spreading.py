"""Queued requests are spread over the leaders of what a pipeline is split into."""

from __future__ import annotations

from services.worker.engine.request import Request
from services.worker.engine.spreading import spread
from tests.unit.engine.engine_helpers import make_request


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // 4)


def requests(*lengths: int) -> list[Request]:
    return [
        make_request(f"r{number}", length, arrival_seconds=float(number))
        for number, length in enumerate(lengths)
    ]


def names(shares: dict[str, list[Request]]) -> dict[str, list[str]]:
    return {leader: [r.request_id for r in share] for leader, share in shares.items()}


def test_each_goes_to_the_leader_with_the_least_to_do() -> None:
    shares = spread(requests(4, 4, 4, 4), {"a": 2, "b": 0}, {"a": 1, "b": 1}, blocks_for)
    assert names(shares) == {"a": ["r2"], "b": ["r0", "r1", "r3"]}


def test_a_group_of_two_takes_twice_as_much() -> None:
    shares = spread(requests(*[4] * 6), {"a": 0, "b": 0}, {"a": 2, "b": 1}, blocks_for)
    assert [len(share) for share in shares.values()] == [4, 2]


def test_long_requests_count_for_what_they_need() -> None:
    shares = spread(requests(40, 4, 4, 4), {"a": 0, "b": 0}, {"a": 1, "b": 1}, blocks_for)
    assert names(shares) == {"a": ["r0"], "b": ["r1", "r2", "r3"]}


def test_one_leader_keeps_all() -> None:
    shares = spread(requests(4, 4), {"a": 9}, {"a": 3}, blocks_for)
    assert names(shares) == {"a": ["r0", "r1"]}
