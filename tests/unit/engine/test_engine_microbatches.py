"""The lookahead formulation: equal costs, nothing lost, and how a batch uses it."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_helpers import BLOCK_SIZE, PagedModel, make_request, make_scheduler
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.config import ChunkPolicy
from services.worker.engine.cost_model import TOKEN_COUNT, ChunkShape, CostModel
from services.worker.engine.microbatches import (
    Microbatch,
    PrefillChunk,
    batch_cost,
    formulate,
    split,
)
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.scheduler import Scheduler

MANY = 1_000_000
MODEL = CostModel(alpha=0.01, beta=1.0, gamma=12.0, lam=9.0)

work_lists = st.lists(
    st.builds(ChunkShape, st.integers(0, 300), st.integers(0, 120)), min_size=1, max_size=8
)
models = st.builds(
    lambda alpha, beta, lam, extra, kappa: CostModel(alpha, beta, lam + extra, lam, kappa),
    st.floats(0.0, 0.1),
    st.floats(0.01, 2.0),
    st.floats(0.0, 20.0),
    st.floats(0.0, 10.0),
    st.floats(0.0, 0.5),
)


def _num_tokens(batch: Microbatch) -> int:
    return sum(chunk.num_tokens for chunk in batch)


def _cuts(batch: Microbatch) -> list[tuple[Microbatch, Microbatch]]:
    """Every way to cut a batch in two."""
    cuts = []
    for position, (index, prefix, num_tokens) in enumerate(batch):
        for n in range(num_tokens):
            head = (PrefillChunk(index, prefix, n),) if n else ()
            tail = PrefillChunk(index, prefix + n, num_tokens - n)
            cuts.append(((*batch[:position], *head), (tail, *batch[position + 1 :])))
    return [*cuts, (batch, ())]


@given(work_lists, models)
def test_a_split_is_as_even_as_any(work: list[ChunkShape], model: CostModel) -> None:
    batch = tuple(PrefillChunk(i, *shape) for i, shape in enumerate(work) if shape.num_tokens)
    if not batch:
        return

    def unevenness(halves: tuple[Microbatch, Microbatch]) -> float:
        first, second = (sum(model.marginal_cost(c.shape) for c in half) for half in halves)
        return abs(first - second)

    best = min(unevenness(halves) for halves in _cuts(batch))
    assert unevenness(split(batch, model)) == pytest.approx(best, rel=1e-6, abs=1e-6)


@given(work_lists, models, st.integers(1, 64))
def test_nothing_is_lost_and_every_request_stays_in_order(
    work: list[ChunkShape], model: CostModel, min_tokens: int
) -> None:
    position = {i: shape.num_prefix_tokens for i, shape in enumerate(work)}
    order = []
    for chunk in (chunk for batch in formulate(work, model, min_tokens, MANY) for chunk in batch):
        assert chunk.num_tokens > 0
        assert chunk.num_prefix_tokens == position[chunk.request_index]
        position[chunk.request_index] += chunk.num_tokens
        order.append(chunk.request_index)
    assert position == {i: sum(shape) for i, shape in enumerate(work)}
    assert order == sorted(order)


@given(work_lists, st.integers(1, 64), st.integers(1, 200))
def test_the_number_of_batches_obeys_both_bounds(
    work: list[ChunkShape], min_tokens: int, max_tokens: int
) -> None:
    batches = formulate(work, MODEL, min_tokens, max_tokens)
    num_tokens = sum(shape.num_tokens for shape in work)
    assert all(_num_tokens(batch) <= max_tokens for batch in batches)
    if len(batches) > 1 and len(formulate(work, MODEL, min_tokens, MANY)) == len(batches):
        assert num_tokens >= min_tokens * len(batches)


def test_costs_are_even_where_token_counts_are_not() -> None:
    """The same tokens cost more behind a long prefix; the paper's point."""
    work = [ChunkShape(0, 4000), ChunkShape(0, 500), ChunkShape(0, 1500), ChunkShape(0, 2000)]
    model = CostModel(alpha=0.001, beta=1.0, gamma=12.0, lam=9.0)

    def spread(batches: tuple[Microbatch, ...]) -> float:
        costs = [batch_cost(batch, model) for batch in batches]
        return max(costs) / min(costs)

    assert spread(formulate(work, model, 400, MANY)) < 1.03
    assert spread(formulate(work, TOKEN_COUNT, 400, MANY)) > 1.5


def test_no_work_gives_no_batches() -> None:
    assert formulate([], MODEL, 8, MANY) == ()
    assert formulate([ChunkShape(5, 0)], MODEL, 8, MANY) == ()


class TestPipeline:
    """How a scheduler fills a pipeline."""

    def _fill(self, scheduler: Scheduler) -> list[SchedulerOutput]:
        outputs = []
        while (output := scheduler.schedule(0.0)).scheduled:
            outputs.append(output)
        return outputs

    def _serve(self, scheduler: Scheduler, num_batches: int) -> list[SchedulerOutput]:
        """Keep the pipeline full; batches return in order."""
        model, in_flight, served = PagedModel(BLOCK_SIZE), self._fill(scheduler), []
        while len(served) < num_batches and in_flight:
            output = in_flight.pop(0)
            scheduler.update_from_output(output, model.compute(output))
            served.append(output)
            in_flight += self._fill(scheduler)
        return served

    @pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
    def test_as_many_batches_as_stages(self, num_stages: int) -> None:
        scheduler, _ = make_scheduler(num_blocks=64, num_stages=num_stages, max_num_seqs=4)
        for i in range(12):
            scheduler.add(make_request(f"r{i}", 6, float(i)))
        assert len(self._fill(scheduler)) == num_stages

    @pytest.mark.parametrize("num_stages", [2, 4])
    @pytest.mark.parametrize("num_requests", [3, 8, 17])
    def test_decodes_are_spread_evenly_and_all_get_their_turn(
        self, num_stages: int, num_requests: int
    ) -> None:
        scheduler, _ = make_scheduler(
            num_blocks=400, num_stages=num_stages, max_num_seqs=16, max_model_len=64
        )
        for i in range(num_requests):
            scheduler.add(make_request(f"r{i}", 3, float(i), max_tokens=60))
        served = self._serve(scheduler, 15 * num_stages)[10 * num_stages :]
        sizes = [len(output.scheduled) for output in served]
        assert max(sizes) <= -(-num_requests // num_stages)
        turns = Counter(item.request.request_id for o in served for item in o.scheduled)
        assert len(turns) == num_requests
        assert max(turns.values()) - min(turns.values()) <= 2

    def test_a_single_request_is_not_held_back(self) -> None:
        scheduler, _ = make_scheduler(num_stages=4)
        scheduler.add(make_request("a", 4, max_tokens=3))
        assert len(self._serve(scheduler, 100)) == 3
        assert not scheduler.requests

    @pytest.mark.parametrize("policy", ChunkPolicy)
    def test_queued_prompts_of_any_length_are_served_completely(self, policy: ChunkPolicy) -> None:
        scheduler, _ = make_scheduler(
            num_blocks=600,
            num_stages=2,
            max_num_batched_tokens=128,
            max_model_len=600,
            chunk_policy=policy,  # type: ignore[arg-type]
            min_prefill_tokens=32,
        )
        for i, length in enumerate((500, 3, 90, 260, 17, 330, 64, 120)):
            scheduler.add(make_request(f"r{i}", length, float(i), max_tokens=2))
        self._serve(scheduler, 1000)
        assert not scheduler.requests

    def test_lookahead_makes_batches_of_equal_cost(self) -> None:
        model = CostModel(alpha=0.01, beta=1.0, gamma=4.0, lam=2.0)
        spreads = {}
        for policy in (ChunkPolicy.LOOKAHEAD, ChunkPolicy.TOKEN_COUNT):
            scheduler, _ = make_scheduler(
                num_blocks=1500,
                num_stages=2,
                max_num_batched_tokens=256,
                max_model_len=1200,
                cost_model=model,
                chunk_policy=policy,  # type: ignore[arg-type]
                min_prefill_tokens=128,
            )
            for i, length in enumerate((900, 40, 700, 800, 60, 500, 600, 90)):
                scheduler.add(make_request(f"r{i}", length, float(i), max_tokens=1))
            served = self._serve(scheduler, 16)[2:]
            costs = [
                model.batch_cost(
                    ChunkShape(i.num_computed_tokens, i.num_scheduled_tokens)
                    for i in output.scheduled
                )
                for output in served
            ]
            spreads[policy] = max(costs) / min(costs)
        assert spreads[ChunkPolicy.LOOKAHEAD] < 1.25 < spreads[ChunkPolicy.TOKEN_COUNT]
