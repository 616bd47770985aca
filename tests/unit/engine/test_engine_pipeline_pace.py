"""A pipeline of two under a steady load, in simulated time: it keeps pace with replicas.

The scheduler is the real one; batches take what the cost model of SmolLM2 on one core says (as
measured), times some noise. Two stages of 17 and 13 layers, the second with the LM head.
"""

from __future__ import annotations

import random
from statistics import median
from typing import NamedTuple

from engine_helpers import make_request, make_scheduler

from services.worker.engine.config import ChunkPolicy
from services.worker.engine.cost_model import ChunkShape, CostModel
from services.worker.engine.outputs import SchedulerOutput
from services.worker.engine.profile import LinearCost

LAYER = CostModel(1.67e-8, 3.04e-5, gamma=1.3e-4, lam=1.27e-4, kappa=8.5e-8, floor=4.2e-4)
HEAD = LinearCost(2.8e-3, 2.2e-4)
BATCH_SECONDS, HOP_SECONDS = 0.001, 0.0003  # what Python and links add
SETTLED_SECONDS, END_SECONDS = 5.0, 25.0


class Outcome(NamedTuple):
    """Seconds per token of the median request, and the share of time in which stages wait."""

    tpot_seconds: float
    bubble_share: float


class Simulation:
    """Requests of about 96 prompt and 96 output tokens, replaced as they end."""

    def __init__(self, layers: tuple[int, ...], policy: ChunkPolicy, concurrency: int) -> None:
        self.layers = layers
        self.random = random.Random(1)
        self.scheduler, _ = make_scheduler(
            num_blocks=6000,
            block_size=16,
            num_stages=len(layers),
            cost_model=LAYER,
            chunk_policy=policy,  # type: ignore[arg-type]
            max_num_batched_tokens=256,
            max_num_seqs=256,
            max_model_len=8192,
        )
        self.now = 0.0  # of stage 0
        self.free_at = [0.0] * len(layers)
        self.waited = self.worked = 0.0
        self.returning: list[tuple[float, SchedulerOutput]] = []
        self.tpots: list[float] = []
        self.num_requests = 0
        for _ in range(concurrency):
            self.arrive()

    def arrive(self) -> None:
        prompt, output = (round(96 * self.random.uniform(0.5, 1.5)) for _ in range(2))
        name = f"r{self.num_requests}"
        request = make_request(name, prompt, self.now, max_tokens=output, ignore_eos=True)
        self.scheduler.add(request)
        self.num_requests += 1

    def run(self) -> Outcome:
        first: dict[str, float] = {}
        while self.now < END_SECONDS:
            for at, output in [each for each in self.returning if each[0] <= self.now]:
                self.returning.remove((at, output))
                tokens = [5] * len(output.sampled_requests)
                for result in self.scheduler.update_from_output(output, tokens):
                    started_at = first.setdefault(result.request.request_id, at)
                    if result.finish_reason is not None:
                        if started_at > SETTLED_SECONDS:
                            self.tpots.append((at - started_at) / result.index)
                        self.arrive()
            output = self.scheduler.schedule(self.now)
            if output.scheduled:
                self.compute(output)
            else:
                self.now = min(at for at, _ in self.returning)
        return Outcome(median(self.tpots), self.waited / (self.waited + self.worked))

    def compute(self, output: SchedulerOutput) -> None:
        """Send a batch through the stages; each begins when batch and stage are ready."""
        chunks = [
            ChunkShape(i.num_computed_tokens, i.num_scheduled_tokens) for i in output.scheduled
        ]
        cost, at = LAYER.batch_cost(chunks), self.now
        for place, num_layers in enumerate(self.layers):
            seconds = num_layers * cost
            if place == len(self.layers) - 1:
                seconds += HEAD.seconds(len(output.sampled_requests))
            seconds = seconds * self.random.lognormvariate(0.0, 0.05) + BATCH_SECONDS
            start = max(at, self.free_at[place])
            if start > SETTLED_SECONDS:
                self.waited += start - self.free_at[place]
                self.worked += seconds
            self.free_at[place] = start + seconds
            at = self.free_at[place] + (HOP_SECONDS if len(self.layers) > 1 else 0.0)
        self.now = self.free_at[0]
        self.returning.append((at, output))


def test_a_pipeline_keeps_pace_with_replicas() -> None:
    replica = Simulation((30,), ChunkPolicy.LOOKAHEAD, 24).run()
    lookahead = Simulation((17, 13), ChunkPolicy.LOOKAHEAD, 48).run()
    by_count = Simulation((17, 13), ChunkPolicy.TOKEN_COUNT, 48).run()
    assert lookahead.tpot_seconds < 1.1 * replica.tpot_seconds < by_count.tpot_seconds
    assert lookahead.bubble_share < 0.06 < by_count.bubble_share
