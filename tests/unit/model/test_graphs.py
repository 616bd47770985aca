"""Decode through persistent inputs and segments computes what launching one by one computes.

Capture is imitated: what was recorded is called again on replay. So addresses, padding and segments
are what is tested; real graphs are in `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from services.worker.model.config import ModelConfig
from services.worker.model.graphs import DecodeGraphs, Work, padded_batch_size
from services.worker.model.layers.base import DecoderLayers
from services.worker.model.layers.torch_llama import TorchLlamaLayers
from services.worker.model.layers.torch_transformers import TorchTransformersLayers
from services.worker.model.stage import Stage
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, OTHERS, VOCAB_SIZE, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.model.model_helpers import (
    BLOCK_SIZE,
    MAX_NUM_TOKENS,
    WHOLE,
    open_stage,
    random_tokens,
    run_route,
)

KERNELS = TorchKernels(torch.device("cpu"), torch.float32, TorchOps())
LENGTHS = [17, 3, 30, 16, 2]
FUSED = "mistral-window"


class ImitatedCapture:
    """Implements `Capture`; counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, work: Work) -> Work:
        self.num_captures += 1

        def replay() -> None:
            self.num_replays += 1
            work()

        return replay


@contextmanager
def stages(
    tiny_models: TinyModels, capture: ImitatedCapture, segment_layers: int, name: str = FUSED
) -> Iterator[tuple[Stage, Stage]]:
    """One that replays, and one that does not."""

    def graphed(config: ModelConfig, kernels: TorchKernels) -> DecoderLayers[Any]:
        graphs = DecodeGraphs(config, kernels, capture, segment_layers)
        layers = TorchTransformersLayers if name in OTHERS else TorchLlamaLayers
        return layers(config, kernels, graphs, MAX_NUM_TOKENS)

    directory = tiny_models.directory(name)
    with (
        open_stage(directory, KERNELS, make_layers=graphed) as one,
        open_stage(directory, KERNELS) as other,
    ):
        for length, block in zip(LENGTHS, range(0, 20, 4), strict=True):
            prompt = random_tokens(length, seed=length, vocab_size=VOCAB_SIZE)
            slices = [SequenceSlice(prompt, 0, range(block, block + 4), False)]
            for stage in (one.stage, other.stage):
                run_route([(stage, WHOLE)], make_batch(slices, BLOCK_SIZE))
        yield one.stage, other.stage


def decode_batch(num_seqs: int, step: int) -> ForwardBatch:
    """The next token of the first sequences."""
    return make_batch(
        [
            SequenceSlice([7 + step + i], LENGTHS[i] + step, range(4 * i, 4 * i + 4), True)
            for i in range(num_seqs)
        ],
        BLOCK_SIZE,
    )


@pytest.mark.parametrize(
    ("name", "segment_layers"),
    [*((FUSED, count) for count in (1, 3, NUM_LAYERS, 7)), *((name, 3) for name in OTHERS)],
)
def test_decode_is_the_same_at_every_batch_size(
    name: str, segment_layers: int, tiny_models: TinyModels
) -> None:
    capture = ImitatedCapture()
    with stages(tiny_models, capture, segment_layers, name) as (graphed, eager):
        for step, num_seqs in enumerate([5, 3, 5, 1, 5, 3]):
            batch = decode_batch(num_seqs, step)
            actual = run_route([(graphed, WHOLE)], batch)
            torch.testing.assert_close(actual, run_route([(eager, WHOLE)], batch))
    num_segments = -(-NUM_LAYERS // segment_layers)
    assert capture.num_captures == 3 * num_segments  # batches of 8, 4 and 1
    assert capture.num_replays == 3 * num_segments


def test_a_cut_within_a_segment_needs_no_capture_and_spoils_none(tiny_models: TinyModels) -> None:
    capture = ImitatedCapture()
    with stages(tiny_models, capture, segment_layers=2) as (graphed, eager):
        batch = decode_batch(2, 0)
        expected = run_route([(eager, WHOLE)], batch)
        spans = [Span(start=0, end=3), Span(start=3, end=NUM_LAYERS)]
        for _ in range(2):
            actual = run_route([(graphed, span) for span in spans], batch)
            torch.testing.assert_close(actual, expected)
        assert capture.num_captures == capture.num_replays == 1  # layers [0, 2)
        torch.testing.assert_close(run_route([(graphed, WHOLE)], batch), expected)


def test_prompts_are_not_captured(tiny_models: TinyModels) -> None:
    capture = ImitatedCapture()
    with stages(tiny_models, capture, segment_layers=2):
        assert capture.num_captures == 0


def test_a_padded_batch_holds_the_batch() -> None:
    for num_seqs in range(1, 257):
        size = padded_batch_size(num_seqs)
        assert num_seqs <= size <= min(256, max(4, num_seqs + 31))
        assert padded_batch_size(size) == size
