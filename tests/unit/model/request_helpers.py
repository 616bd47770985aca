"""Runs requests through the real engine and model, and what transformers says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from services.worker.core import EngineCore
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.scheduler import Scheduler
from services.worker.model.batch import SequenceSlice
from services.worker.model.pending import KnownTokens, PendingTokens
from services.worker.model.runner import ModelRunner
from services.worker.model.sampler import SamplingRow, sample
from shared.sampling import SamplingParams
from tests.unit.model.model_helpers import last_logits

#: Where the reference's two best logits are closer, either choice is right.
NEARLY_EQUAL = 2e-4


def make_request(
    name: str, prompt: list[int], eos_token_ids: Sequence[int] = (), **sampling: object
) -> Request:
    return Request(
        request_id=name,
        router_id="router",
        attempt=0,
        prompt_token_ids=prompt,
        sampling=SamplingParams.model_validate(sampling),
        arrival_seconds=0.0,
        eos_token_ids=frozenset(eos_token_ids),
    )


@dataclass
class EngineRun:
    """What came out of a run."""

    tokens: dict[str, list[int]] = field(default_factory=dict)  # by request id
    logits: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)  # by all tokens
    num_preemptions: int = 0


class _RecordingModel:
    """The runner, noting the logits it computes by the tokens before them."""

    def __init__(self, runner: ModelRunner, run: EngineRun) -> None:
        self._runner = runner
        self._run = run

    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None,
    ) -> PendingTokens:
        logits = last_logits(self._runner, slices)
        for row, values in zip(rows, logits.clone(), strict=True):
            self._run.logits[(*row.prompt_token_ids, *row.output_token_ids)] = values
        return KnownTokens(sample(logits.cpu(), rows))


def run_engine(
    runner: ModelRunner,
    requests: Sequence[Request],
    num_blocks: int,
    max_num_batched_tokens: int = 64,
) -> EngineRun:
    """All requests at once through scheduler and model, in a pool of `num_blocks` blocks."""
    run = EngineRun(tokens={request.request_id: [] for request in requests})
    config = SchedulerConfig(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=32,
        max_model_len=min(runner.max_model_len, num_blocks * runner.block_size),
        watermark=0.0,
        recovery_watermark=0.0,
    )
    scheduler = Scheduler(config, BlockManager(num_blocks, runner.block_size))
    core = EngineCore(scheduler, _RecordingModel(runner, run))
    for request in requests:
        assert core.add(request) == []
    for step in range(10_000):
        if not core.has_work:
            break
        for item in core.step(now=float(step)):
            assert not item.error, item.error
            run.tokens[item.request_id] += item.token_ids
    assert not core.has_work
    core.check_integrity()
    run.num_preemptions = core.load().num_preemptions
    return run


def greedy_reference(model: PreTrainedModel, request: Request) -> list[int]:
    """Tokens of transformers' `generate`, up to the first step whose choice was nearly a tie."""
    with torch.inference_mode():
        generated = model.generate(
            torch.tensor([request.prompt_token_ids]),
            attention_mask=torch.ones(1, request.num_prompt_tokens, dtype=torch.int64),
            max_new_tokens=request.sampling.max_tokens,
            do_sample=False,
            eos_token_id=sorted(request.eos_token_ids) or None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens: list[int] = generated.sequences[0, request.num_prompt_tokens :].tolist()
    for step, logits in enumerate(generated.logits):
        best, second = torch.topk(logits[0], 2).values.tolist()
        if best - second < NEARLY_EQUAL:
            return tokens[:step]
    return tokens
