"""A device that computes by itself: the tokens are those of steps that wait for it.

The layers and the sampler of a CUDA worker on the CPU, with copies that are late (`LateCopier`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from services.worker.core import EngineCore
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.scheduler import Scheduler
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.queues.staged import StagedQueue
from services.worker.model.runner import ModelRunner
from shared.messages import FinishReason, TokenLogprobs
from tests.late_copier import LateCopier
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.model.model_helpers import PagedSequence, open_runner, random_tokens
from tests.unit.model.request_helpers import make_request

KERNELS = TorchKernels(torch.device("cpu"), torch.float32, TorchOps())
SAMPLINGS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.7, "min_tokens": 9, "logprobs": 0},
    {"temperature": 1.5, "top_k": 40, "min_p": 0.01, "seed": 5},
]


@dataclass
class Served:
    """What came out of a run."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    num_preemptions: int = 0
    num_ahead: int = 0  # steps that left a batch computing


def requests() -> list[Request]:
    """All ways of sampling, prompts of one chunk and of several, half of them with stop tokens."""
    return [
        make_request(
            f"r{index}",
            random_tokens(5 + 23 * index % 60, index, VOCAB_SIZE),
            max_tokens=24,
            stop_token_ids=random_tokens(12, index, VOCAB_SIZE) if index % 2 else (),
            **SAMPLINGS[index % len(SAMPLINGS)],
        )
        for index in range(10)
    ]


def serve(runner: ModelRunner, num_blocks: int, *, overlaps: bool) -> Served:
    config = SchedulerConfig(
        max_num_batched_tokens=32,
        max_num_seqs=8,
        max_model_len=num_blocks * runner.block_size,
        watermark=0.0,
        recovery_watermark=0.0,
        overlaps=overlaps,
    )
    core = EngineCore(Scheduler(config, BlockManager(num_blocks, runner.block_size)), runner)
    for request in requests():
        assert core.add(request) == []
    served = Served()
    while core.has_work:
        for item in core.step(0.0):
            assert not item.error, item.error
            served.tokens.setdefault(item.request_id, []).extend(item.token_ids)
            served.logprobs.setdefault(item.request_id, []).extend(item.logprobs or ())
            if item.finish_reason is not None:
                served.reasons[item.request_id] = item.finish_reason
        served.num_ahead += core.is_computing
    core.check_integrity()
    served.num_preemptions = core.load().num_preemptions
    return served


@pytest.fixture(scope="module")
def late_runner(tiny_models: TinyModels) -> Iterator[ModelRunner]:
    with open_runner(
        tiny_models.directory("llama"), KERNELS, queue=StagedQueue(LateCopier())
    ) as runner:
        yield runner


@pytest.mark.parametrize(("num_blocks", "preempts"), [(64, False), (8, True)])
def test_tokens_and_logprobs_are_those_of_steps_that_wait(
    late_runner: ModelRunner, num_blocks: int, preempts: bool
) -> None:
    late = serve(late_runner, num_blocks, overlaps=True)
    waiting = serve(late_runner, num_blocks, overlaps=False)
    assert late.tokens == waiting.tokens
    assert late.reasons == waiting.reasons
    assert set(late.reasons.values()) == {FinishReason.STOP, FinishReason.LENGTH}
    for name, expected in waiting.logprobs.items():
        for one, other in zip(late.logprobs[name], expected, strict=True):
            assert (one.rank, one.top_token_ids) == (other.rank, other.top_token_ids)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert (late.num_preemptions > 0) is (waiting.num_preemptions > 0) is preempts
    assert late.num_ahead > 20


def test_a_launch_leaves_the_host_with_nothing_but_two_copies(tiny_models: TinyModels) -> None:
    """One of the batch and one of what the sampler needs; tokens come back in one."""
    copier = LateCopier()
    with open_runner(tiny_models.directory("llama"), KERNELS, queue=StagedQueue(copier)) as runner:
        core = EngineCore(
            Scheduler(SchedulerConfig(32, 8, 64), BlockManager(8, runner.block_size)), runner
        )
        core.add(make_request("r", random_tokens(20, 1, VOCAB_SIZE), temperature=0.7, seed=1))
        assert core.step(0.0) == []
        assert (copier.num_uploads, copier.num_downloads) == (2, 1)
        assert runner.activity.is_running
        assert len(core.step(0.0)) == 1  # waits
        runner.note_progress()
        assert not runner.activity.is_running


def test_layers_that_were_launched_are_timed_when_they_are_done(
    tiny_models: TinyModels,
) -> None:
    with open_runner(
        tiny_models.directory("llama"), KERNELS, queue=StagedQueue(LateCopier())
    ) as runner:
        sequence = PagedSequence(random_tokens(9, 2, VOCAB_SIZE), [0]).take(9)
        batch = runner.make_batch([sequence])
        runner.forward(batch, runner.embed(batch), runner.span)
        assert runner.activity.is_running
        assert not runner.activity.is_idle(1e9)
