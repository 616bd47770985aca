"""No configuration stalls: whatever the limits and the cost model, queued prompts are served."""

from __future__ import annotations

from collections import deque

from engine_helpers import make_request, make_scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.config import ChunkPolicy
from services.worker.engine.cost_model import CostModel
from services.worker.engine.outputs import SchedulerOutput

coefficients = st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 50.0])
cost_models = st.builds(
    lambda alpha, beta, lam, extra, kappa: CostModel(alpha, beta, lam + extra, lam, kappa),
    coefficients,
    st.sampled_from([1e-6, 1e-3, 1.0]),
    coefficients,
    coefficients,
    coefficients,
)


@given(
    model=cost_models,
    policy=st.sampled_from(ChunkPolicy),
    num_stages=st.integers(1, 4),
    min_prefill_tokens=st.sampled_from([1, 4, 9, 20, 64]),
    max_num_batched_tokens=st.one_of(st.integers(2, 12), st.integers(2, 64)),
    max_num_seqs=st.integers(1, 4),
    lengths=st.lists(st.sampled_from([1, 7, 30, 150]), min_size=1, max_size=14),
)
@settings(max_examples=300)
def test_every_request_finishes(
    model: CostModel,
    policy: ChunkPolicy,
    num_stages: int,
    min_prefill_tokens: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    lengths: list[int],
) -> None:
    scheduler, _ = make_scheduler(
        num_blocks=200,
        num_stages=num_stages,
        cost_model=model,
        max_model_len=160,
        chunk_policy=policy,  # type: ignore[arg-type]
        min_prefill_tokens=min_prefill_tokens,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=min(max_num_seqs, max_num_batched_tokens),
    )
    for i, length in enumerate(lengths):
        scheduler.add(make_request(f"r{i}", length, float(i), max_tokens=2))
    in_flight: deque[SchedulerOutput] = deque()
    while scheduler.requests:
        output = scheduler.schedule(0.0)
        if output.scheduled:
            in_flight.append(output)
            continue
        assert in_flight, "nothing is in flight and nothing is scheduled"
        returned = in_flight.popleft()
        scheduler.update_from_output(returned, [5] * len(returned.sampled_requests))


def _prefill_sizes(policy: ChunkPolicy, lengths: list[int], num_batches: int) -> list[int]:
    """Prefill tokens of the next batches of a pipeline on which 32 requests decode already."""
    scheduler, _ = make_scheduler(
        num_blocks=8000,
        num_stages=2,
        cost_model=CostModel(alpha=1e-4, beta=1.0, gamma=0.5, lam=0.5),
        max_model_len=2000,
        chunk_policy=policy,  # type: ignore[arg-type]
        max_num_batched_tokens=256,
        max_num_seqs=64,
        min_prefill_tokens=64,
    )
    in_flight: deque[SchedulerOutput] = deque()

    def advance() -> SchedulerOutput:
        while (output := scheduler.schedule(0.0)).scheduled:
            in_flight.append(output)
        returned = in_flight.popleft()
        scheduler.update_from_output(returned, [5] * len(returned.sampled_requests))
        return returned

    for i in range(32):
        scheduler.add(make_request(f"d{i}", 4, 0.0, max_tokens=1000))
    while any(request.num_output_tokens < 2 for request in scheduler.requests.values()):
        advance()
    for i, length in enumerate(lengths):
        scheduler.add(make_request(f"p{i}", length, 1.0, max_tokens=1000))
    batches = [advance() for _ in range(num_batches)]
    prefills = ((i.num_scheduled_tokens for i in b.scheduled) for b in batches)
    return [sum(tokens for tokens in batch if tokens > 1) for batch in prefills]


def test_a_prompt_that_arrives_does_not_make_one_batch_long() -> None:
    assert max(_prefill_sizes(ChunkPolicy.TOKEN_COUNT, [200], 8)) == 200
    sizes = _prefill_sizes(ChunkPolicy.LOOKAHEAD, [200], 40)
    assert max(sizes) <= 24
    assert sum(sizes) >= 199


def test_a_deep_queue_fills_the_batches() -> None:
    for policy in (ChunkPolicy.LOOKAHEAD, ChunkPolicy.TOKEN_COUNT):
        sizes = _prefill_sizes(policy, [500] * 30, 16)
        assert sum(sizes[2:]) / len(sizes[2:]) > 180, policy
