"""A stage computes what transformers computes, in any cut, and after layers left and came back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.memory.errors import OutOfChunksError
from services.worker.model.batch import ForwardBatch, SequenceSlice, make_batch
from shared.layout import Span
from tests.tiny_models import ALL, LLAMA_FAMILY, MAX_MODEL_LEN, NUM_LAYERS, VOCAB_SIZE, TinyModels
from tests.unit.model.model_helpers import (
    BLOCK_SIZE,
    WHOLE,
    LayersFactory,
    LoadedStage,
    open_stage,
    random_tokens,
    run_route,
    served_layers,
    transformers_layers,
    whole_batch,
)

FIRST = random_tokens(53, seed=1, vocab_size=VOCAB_SIZE)
SECOND = random_tokens(30, seed=2, vocab_size=VOCAB_SIZE)
SERVED = [(name, served_layers) for name in ALL]
ORACLES = [(name, transformers_layers) for name in LLAMA_FAMILY]


def mixed_batches() -> list[ForwardBatch]:
    """Two sequences in three steps: prefill, prefill next to a chunk, decode next to decode."""
    first, second = [7, 2, 9, 4], [1, 12]
    steps = [
        [SequenceSlice(FIRST[:40], 0, first, False)],
        [SequenceSlice(FIRST[40:52], 40, first, True), SequenceSlice(SECOND[:29], 0, second, True)],
        [SequenceSlice(SECOND[29:], 29, second, True), SequenceSlice(FIRST[52:], 52, first, True)],
    ]
    return [make_batch(step, BLOCK_SIZE) for step in steps]


def run_mixed(*stages: LoadedStage) -> list[torch.Tensor]:
    route = [(loaded.stage, loaded.stage.span) for loaded in stages]
    return [run_route(route, batch) for batch in mixed_batches()]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "make_layers"), SERVED + ORACLES)
def test_logits_are_those_of_transformers(
    name: str, make_layers: LayersFactory, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    token_ids = random_tokens(MAX_MODEL_LEN, seed=3, vocab_size=VOCAB_SIZE)
    with torch.inference_mode():
        expected = tiny_models.reference(name)(torch.tensor([token_ids])).logits[0]
    assert expected.std() > 0.5  # the comparison would prove little otherwise
    with open_stage(tiny_models.directory(name), kernels, make_layers=make_layers) as loaded:
        actual = run_route([(loaded.stage, WHOLE)], whole_batch(token_ids))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_every_cut_gives_the_bits_of_the_whole(
    name: str, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory(name)
    with open_stage(directory, kernels) as whole:
        expected = run_mixed(whole)
    for cut in range(1, NUM_LAYERS):
        with ExitStack() as stack:
            spans = (Span(start=0, end=cut), Span(start=cut, end=NUM_LAYERS))
            stages = [stack.enter_context(open_stage(directory, kernels, s)) for s in spans]
            assert_same_bits(run_mixed(*stages), expected)


def test_a_stage_for_every_layer(tiny_models: TinyModels, kernels: CpuKernels) -> None:
    directory = tiny_models.directory("qwen2-tied")
    with open_stage(directory, kernels) as whole:
        expected = run_mixed(whole)
    with ExitStack() as stack:
        stages = [
            stack.enter_context(open_stage(directory, kernels, Span(start=i, end=i + 1)))
            for i in range(NUM_LAYERS)
        ]
        assert_same_bits(run_mixed(*stages), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_span_loads_only_what_it_runs(
    name: str, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    is_tied = ALL[name].tie_word_embeddings
    loaded = {}
    for span in (Span(start=0, end=2), Span(start=1, end=3), Span(start=2, end=4), WHOLE):
        with open_stage(tiny_models.directory(name), kernels, span) as stage:
            loaded[str(span)] = [arena.name for arena in stage.plan.arenas(span)]
    head = "embedding" if is_tied else "head"
    assert loaded["[0, 2)"] == ["layer.0", "layer.1", "embedding"]
    assert loaded["[1, 3)"] == ["layer.1", "layer.2"]
    assert loaded["[2, 4)"] == ["layer.2", "layer.3", head]
    assert set(loaded["[0, 4)"]) >= {"embedding", head}


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "smollm3"])
def test_layers_leave_give_their_memory_to_the_kv_and_come_back(
    name: str, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    directory = tiny_models.directory(name)
    front, back = Span(start=0, end=2), Span(start=2, end=NUM_LAYERS)
    batches = mixed_batches()
    with open_stage(directory, kernels) as whole:
        expected = run_mixed(whole)
    with open_stage(directory, kernels) as dropping, open_stage(directory, kernels, back) as peer:
        stage, pool = dropping.stage, dropping.pool
        blocks_before = pool.num_kv_blocks(range(NUM_LAYERS))
        pipeline = [(stage, front), (peer.stage, back)]
        assert_same_bits([run_route(pipeline, batches[0])], expected[:1])

        stage.drop(front)
        pool.check_integrity()
        assert pool.grow_kv_evenly([0, 1]) > blocks_before
        assert_same_bits([run_route(pipeline, batch) for batch in batches[1:]], expected[1:])
        with pytest.raises(ValueError, match="layer 2 is not loaded"):
            run_route([(stage, WHOLE)], batches[0])

        pool.shrink_kv([0, 1], blocks_before)
        pool.trim()  # nothing of the old weights is left in the chunks
        assert sum(stage.load(WHOLE)) > 0
        assert stage.resident_layers == (WHOLE,)
        assert_same_bits(run_mixed(dropping), expected)


def test_a_layer_comes_back_only_when_there_is_room(
    tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    with open_stage(tiny_models.directory("llama"), kernels) as loaded:
        expected = run_mixed(loaded)
        blocks = loaded.pool.num_kv_blocks(range(NUM_LAYERS))
        loaded.stage.drop(Span(start=0, end=1))
        loaded.pool.grow_kv_evenly([0])
        with pytest.raises(OutOfChunksError):
            list(loaded.stage.load(WHOLE))
        loaded.pool.shrink_kv([0], blocks)
        loaded.pool.trim()
        list(loaded.stage.load(WHOLE))
        assert_same_bits(run_mixed(loaded), expected)


def test_memory_stays_within_the_budget(tiny_models: TinyModels, kernels: CpuKernels) -> None:
    with open_stage(tiny_models.directory("llama"), kernels) as loaded:
        run_mixed(loaded)
        used = loaded.pool.usage.weight_bytes
        assert used <= loaded.memory.resident_bytes <= loaded.pool.budget_bytes
        loaded.stage.drop(Span(start=0, end=1))
        loaded.pool.trim()
        assert loaded.memory.resident_bytes < used
