"""Output tokens/s of one engine beside transformers' continuous batching, on the same device.

The same shape, prompts and lengths for both, greedy, all requests there from the start, random
weights. No HTTP and no bus on either side. Used by `benchmarks.gpu`; a small model runs on a CPU,
too. Never run on a GPU yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu_model import SHAPES
from benchmarks.report import Table
from services.worker.core import EngineCore
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.scheduler import Scheduler
from services.worker.model.runner import ModelRunner
from services.worker.model.transformers_config import transformers_config
from shared.errors import KunserveError
from shared.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of equal length, all sent at once."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The same random ones at every call."""
        rng = random.Random(1)
        return [
            [rng.randrange(vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_requests)
        ]


@dataclass(frozen=True, slots=True)
class ThroughputFinding:
    """Seconds from the first step to the last token, by who computed it.

    Attributes:
        serial_seconds: ours, when a batch is made only after the one before it.
    """

    workload: Workload
    ours_seconds: float
    serial_seconds: float
    theirs_seconds: float

    @property
    def num_tokens(self) -> int:
        return self.workload.num_requests * self.workload.output_tokens


def measure_ours(
    runner: ModelRunner, workload: Workload, max_num_batched_tokens: int, theirs_seconds: float
) -> ThroughputFinding:
    """Serve the workload with batches made ahead and without, each after a smaller one."""
    seconds = {}
    for overlaps in (True, False):
        for load in (replace(workload, num_requests=1), workload):
            seconds[overlaps] = run_ours(runner, load, max_num_batched_tokens, overlaps=overlaps)
    return ThroughputFinding(workload, seconds[True], seconds[False], theirs_seconds)


def run_ours(
    runner: ModelRunner, workload: Workload, max_num_batched_tokens: int, *, overlaps: bool
) -> float:
    """Let the engine serve the workload; returns seconds.

    Raises:
        KunserveError: a request failed.
    """
    config = SchedulerConfig(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=min(workload.num_requests, max_num_batched_tokens),
        max_model_len=runner.max_model_len,
        overlaps=overlaps,
    )
    core = EngineCore(Scheduler(config, BlockManager(runner.num_blocks, runner.block_size)), runner)
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True)
    for index, prompt in enumerate(workload.prompts(runner.config.vocab_size)):
        core.add(Request(f"r{index}", "bench", 0, prompt, sampling, arrival_seconds=float(index)))
    num_tokens = 0
    began_at = time.perf_counter()
    while core.has_work:
        for item in core.step(time.perf_counter()):
            if item.error:
                raise KunserveError(item.error)
            num_tokens += len(item.token_ids)
    seconds = time.perf_counter() - began_at
    _check_count(num_tokens, workload)
    return seconds


def run_theirs(model: Any, workload: Workload, vocab_size: int, limits: Mapping[str, int]) -> float:
    """Let transformers serve the workload, after a smaller one to warm up; returns seconds.

    Args:
        limits: fields of its `ContinuousBatchingConfig`; the rest it takes from the free memory.

    Raises:
        KunserveError: a request got another number of tokens.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    never = vocab_size  # an end token that no request can produce
    config_class: Any = GenerationConfig  # untyped in transformers
    generation = config_class(
        max_new_tokens=workload.output_tokens, do_sample=False, eos_token_id=never, pad_token_id=0
    )
    prompts = workload.prompts(vocab_size)
    batching_class: Any = ContinuousBatchingConfig  # as above
    batching = batching_class(**limits)
    try:
        for batch in (prompts[:1], prompts):
            began_at = time.perf_counter()
            outputs = model.generate_batch(
                inputs=batch,
                generation_config=generation,
                continuous_batching_config=batching,
                persistent_manager=True,
            )
            seconds = time.perf_counter() - began_at
    finally:
        model.destroy_cached_continuous_batching_manager()
    _check_count(sum(len(output.generated_tokens) for output in outputs.values()), workload)
    return seconds


def transformers_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The same architecture with weights of its own; speed does not depend on them."""
    from transformers import AutoModelForCausalLM

    auto_class: Any = AutoModelForCausalLM  # untyped in transformers
    with torch.device(device):
        model = auto_class.from_config(transformers_config(SHAPES[shape], shape), dtype=dtype)
    return model.eval()


def _check_count(num_tokens: int, workload: Workload) -> None:
    expected = workload.num_requests * workload.output_tokens
    if num_tokens != expected:
        raise KunserveError(f"{num_tokens} tokens came out, not {expected}")


def render_throughput(findings: Sequence[ThroughputFinding]) -> str:
    rows = [
        [
            f"{one.workload.num_requests} x {one.workload.prompt_tokens}"
            f" + {one.workload.output_tokens}",
            f"{one.num_tokens / one.ours_seconds:.0f}",
            f"{one.num_tokens / one.serial_seconds:.0f}",
            f"{one.num_tokens / one.theirs_seconds:.0f}",
            f"{one.theirs_seconds / one.ours_seconds:.2f}",
        ]
        for one in findings
    ]
    headers = ("requests x prompt + output", "output tok/s", "one by one", "transformers", "ratio")
    return Table(headers, rows).render()
