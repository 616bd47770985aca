"""What a worker says of its costs is what it has, and planners predict what it will have."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.planner.slices import slice_layers
from services.planner.stages import StageShape
from services.worker.engine.cost_model import CostModel, CostModelError, PredictionError
from services.worker.engine.profile import LinearCost, ModelProfile
from services.worker.facts import model_facts
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.profiler import profile_model
from services.worker.model.runner import ModelRunner
from services.worker.profile_cache import ProfileCache, profile_key
from shared.layout import Span
from tests.tiny_models import NUM_LAYERS, TinyModels
from tests.unit.model.model_helpers import CHUNK_BYTES, open_runner

PROFILE = ModelProfile(
    CostModel(1e-6, 2e-5, 3e-4, 2e-4),
    LinearCost(1e-5, 1e-6),
    LinearCost(3e-3, 2e-4),
    PredictionError(0.03, 0.1),
)


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_batched_tokens", [1, 256])
def test_any_worker_can_be_profiled(
    tiny_models: TinyModels, kernels: CpuKernels, max_num_batched_tokens: int
) -> None:
    with open_runner(tiny_models.directory("llama"), kernels) as runner:
        profile = profile_model(runner, max_num_batched_tokens)
    assert profile.head.seconds(4) > 0.0
    assert profile.embedding.seconds(4) > 0.0
    assert profile.head.seconds(0) == 0.0


def test_a_line_through_two_measurements_is_never_negative() -> None:
    assert LinearCost.through((1, 3.0), (3, 5.0)) == LinearCost(2.0, 1.0)
    assert LinearCost.through((1, 3.0), (3, 2.0)) == LinearCost(3.0, 0.0)
    assert LinearCost.through((1, 1.0), (3, 9.0)) == LinearCost(0.0, 4.0)


# --- keeping --------------------------------------------------------------------------------------


def test_a_profile_is_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> ModelProfile:
        calls.append(1)
        return PROFILE

    assert ProfileCache(tmp_path / "new").get("k", measure) == PROFILE
    assert ProfileCache(tmp_path / "new").get("k", measure) == PROFILE
    assert len(calls) == 1
    assert ProfileCache(tmp_path / "new").get("other", measure) == PROFILE
    assert len(calls) == 2


WRONG = [
    "",
    "null",
    "[]",
    "{}",
    PROFILE.to_json()[:-5],
    json.dumps(json.loads(PROFILE.to_json()) | {"layer": {"alpha": "x"}}),
    json.dumps(json.loads(PROFILE.to_json()) | {"head": {"fixed_seconds": -1, "row_seconds": 0}}),
    json.dumps(json.loads(PROFILE.to_json()) | {"fit_error": 3}),
]


@pytest.mark.parametrize("text", WRONG)
def test_a_damaged_file_is_written_anew(tmp_path: Path, text: str) -> None:
    with pytest.raises(CostModelError):
        ModelProfile.from_json(text)
    (tmp_path / "k.json").write_text(text)
    assert ProfileCache(tmp_path).get("k", lambda: PROFILE) == PROFILE
    assert ModelProfile.from_json((tmp_path / "k.json").read_text()) == PROFILE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.json", "k.lock"]


def test_bytes_that_are_no_text_are_written_over(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_bytes(b"\xff\xfe\x00")
    assert ProfileCache(tmp_path).get("k", lambda: PROFILE) == PROFILE


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert ProfileCache(tmp_path / "file" / "below").get("k", lambda: PROFILE) == PROFILE


def test_workers_that_start_together_share_one_measurement(tmp_path: Path) -> None:
    measuring, may_end = threading.Event(), threading.Event()
    results: list[ModelProfile] = []

    def measure() -> ModelProfile:
        assert not measuring.is_set(), "two measure at once"
        measuring.set()
        assert may_end.wait(30.0)
        return PROFILE

    threads = [
        threading.Thread(target=lambda: results.append(ProfileCache(tmp_path).get("k", measure)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert measuring.wait(30.0)
    may_end.set()
    for thread in threads:
        thread.join(30.0)
    assert results == [PROFILE] * 3


def test_whoever_holds_the_lock_for_too_long_is_not_waited_for(tmp_path: Path) -> None:
    def measure() -> ModelProfile:
        return ProfileCache(tmp_path, lock_seconds=0.0).get("k", lambda: PROFILE)

    assert ProfileCache(tmp_path).get("k", measure) == PROFILE


def test_keys_differ_with_every_part() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("abc", 1), ("abc", 2), (b"x", 1)]
    assert len({profile_key(*each) for each in parts}) == len(parts)


# --- what planners make of it ---------------------------------------------------------------------


def _shape(runner: ModelRunner) -> StageShape:
    facts = model_facts(runner)
    memory_bytes = facts.weight_bytes + facts.kv_bytes + facts.free_bytes
    assert memory_bytes == facts.memory_bytes
    held = tuple((span.start, span.end) for span in facts.layers)
    return StageShape(memory_bytes, held, facts.costs, facts.num_layers)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "olmo2"])
@given(
    memory_chunks=st.integers(90, 400),
    head_seconds=st.sampled_from([0.0, 1.0, 2.5]),
    wanted_blocks=st.integers(1, 400),
)
@settings(max_examples=12)
def test_planners_know_the_blocks_of_every_layout(
    tiny_models: TinyModels,
    kernels: CpuKernels,
    name: str,
    memory_chunks: int,
    head_seconds: float,
    wanted_blocks: int,
) -> None:
    """Replica and pipeline have exactly the blocks that the slicing code predicts."""
    with open_runner(tiny_models.directory(name), kernels, memory_chunks * CHUNK_BYTES) as runner:
        shape = _shape(runner)
        assert shape.whole_blocks == runner.num_blocks
        timed = shape.costs.model_copy(update={"layer_seconds": 1.0, "head_seconds": head_seconds})
        shape = StageShape(shape.memory_bytes, shape.held, timed, shape.num_layers)
        slicing = slice_layers([shape, shape], wanted_blocks)
        assert slicing is not None
        cut = slicing.cuts[1]
        blocks = []
        for span in (Span(start=0, end=cut), Span(start=cut, end=NUM_LAYERS)):
            runner.keep(span)
            blocks.append(runner.settle())
            assert model_facts(runner).layers == (span,)
            runner.shrink(shape.whole_blocks, ())
            whole = Span(start=0, end=NUM_LAYERS)
            for _ in runner.load_missing(whole):
                pass
            runner.keep(whole)
            assert runner.num_blocks == shape.whole_blocks
        assert min(blocks) == slicing.num_blocks
