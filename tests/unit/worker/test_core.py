"""The engine's steps with a model that computes at once, and with one whose tokens come late."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core import EngineCore, Model
from services.worker.engine.block_manager import BlockManager
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.request import Request
from services.worker.engine.scheduler import Scheduler
from services.worker.model.batch import SequenceSlice
from services.worker.model.pending import KnownTokens, PendingTokens
from services.worker.model.sampler import SampledToken, SamplingRow
from shared.messages import FinishReason, TokenItem
from shared.sampling import SamplingParams
from tests.late_model import LateModel, LateTokens

BLOCK_SIZE, VOCABULARY, MAX_MODEL_LEN = 4, 97, 32


class CountingModel:
    """Implements `Model` at once: a token depends on all before it, as read back from their blocks.

    Penalties count, too: the token depends on the output that its row brings.
    """

    def __init__(self) -> None:
        self._kv: dict[int, int] = {}  # slot -> token id

    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None,
    ) -> KnownTokens:
        assert source is None
        tokens, next_row = [], iter(rows)
        for item in slices:
            for offset, token_id in enumerate(item.token_ids):
                self._kv[_slot(item, item.start + offset)] = token_id
            if item.wants_token:
                tokens.append(SampledToken(self._sample(item, next(next_row))))
        return KnownTokens(tokens)

    def _sample(self, item: SequenceSlice, row: SamplingRow) -> int:
        end = item.start + len(item.token_ids)
        cached = [self._kv[_slot(item, position)] for position in range(end)]
        assert cached == [*row.prompt_token_ids, *row.output_token_ids]
        assert row.position == end
        state = row.params.seed
        for token_id in cached:
            state = (state * 31 + token_id + 1) % 1_000_003
        while state % VOCABULARY in row.forbidden_token_ids:
            state += 1
        return state % VOCABULARY


def _slot(item: SequenceSlice, position: int) -> int:
    return item.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def make_core(
    model: Model, num_blocks: int = 32, *, overlaps: bool, budget: int = 16
) -> EngineCore:
    config = SchedulerConfig(
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        watermark=0.0,
        recovery_watermark=0.0,
        overlaps=overlaps,
    )
    return EngineCore(Scheduler(config, BlockManager(num_blocks, BLOCK_SIZE)), model)


def make_request(name: str, length: int = 4, arrival: float = 0.0, **sampling: object) -> Request:
    return Request(
        request_id=name,
        router_id="router",
        attempt=0,
        prompt_token_ids=[(7 * sum(name.encode()) + i) % VOCABULARY for i in range(length)],
        sampling=SamplingParams.model_validate({"max_tokens": 6, **sampling}),
        arrival_seconds=arrival,
    )


@dataclass
class Run:
    """What requests brought, and why each ended."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)

    def take(self, items: Sequence[TokenItem]) -> None:
        for item in items:
            tokens = self.tokens.setdefault(item.request_id, [])
            assert item.request_id not in self.reasons
            assert item.index == len(tokens)
            tokens += item.token_ids
            if item.finish_reason is not None:
                self.reasons[item.request_id] = item.finish_reason

    def finish(self, core: EngineCore) -> None:
        for _ in range(5000):
            if not core.has_work:
                break
            self.take(core.step(0.0))
        assert not core.has_work
        assert not core.is_computing
        core.check_integrity()
        assert core.load().kv_blocks_used == 0


def add(core: EngineCore, *requests: Request) -> None:
    for request in requests:
        assert core.add(request) == []


class TestAtOnce:
    """The CPU's way."""

    @pytest.mark.parametrize("overlaps", [True, False])
    def test_every_step_brings_its_own_tokens(self, overlaps: bool) -> None:
        core = make_core(CountingModel(), overlaps=overlaps)
        add(core, make_request("a"), make_request("b"))
        for index in range(6):
            items = core.step(0.0)
            assert [(item.request_id, item.index) for item in items] == [("a", index), ("b", index)]
            assert not core.is_computing
            assert not core.is_waiting
        assert core.step(0.0) == []
        assert core.is_waiting


class TestLate:
    """A device's way."""

    def test_the_next_batch_is_launched_before_the_tokens_are_waited_for(self) -> None:
        model = LateModel(CountingModel())
        core, run = make_core(model, overlaps=True), Run()
        add(core, make_request("a", max_tokens=3))
        assert core.step(0.0) == []
        assert core.is_computing
        assert not core.is_waiting
        for num_launched, index in ((2, 0), (3, 1), (3, 2)):
            items = core.step(0.0)
            assert (len(model.launched), [item.index for item in items]) == (num_launched, [index])
            run.take(items)
        assert run.reasons == {"a": FinishReason.LENGTH}
        assert not core.is_waiting  # the last step had something to do
        assert core.step(0.0) == []
        assert core.is_waiting

    def test_what_is_ready_is_taken_in_without_a_wait(self) -> None:
        num_looks = iter([1000, 0, 1000, 1000])
        core = make_core(LateModel(CountingModel(), lambda: next(num_looks)), overlaps=True)
        add(core, make_request("a"))
        assert [len(core.step(0.0)) for _ in range(4)] == [0, 2, 0, 1]

    def test_without_overlap_a_step_waits_for_the_one_before(self) -> None:
        model = LateModel(CountingModel())
        core, run = make_core(model, overlaps=False), Run()
        add(core, make_request("a"))
        run.finish(core)
        assert (len(run.tokens["a"]), model.num_ahead) == (6, 0)

    def test_a_loss_waits_for_the_device_and_tells_everybody_once(self) -> None:
        model = LateModel(CountingModel())
        core = make_core(model, overlaps=True)
        add(core, make_request("a"), make_request("b", arrival=1.0))
        core.step(0.0)
        core.step(0.0)
        lost = core.lose_all()
        assert [(item.request_id, item.finish_reason) for item in lost] == [
            ("a", FinishReason.LOST),
            ("b", FinishReason.LOST),
        ]
        assert all(each.is_taken for each in model.launched)
        assert not core.is_computing
        core.check_integrity()
        run = Run()
        add(core, make_request("c"))
        run.finish(core)
        assert len(run.tokens["c"]) == 6

    def test_a_loss_minds_no_failure(self) -> None:
        model = LateModel(CountingModel())
        core = make_core(model, overlaps=True)
        add(core, make_request("a"))
        core.step(0.0)
        model.launched[-1].error = RuntimeError("the device is gone")
        assert [item.finish_reason for item in core.lose_all()] == [FinishReason.LOST]


class FailingModel(LateModel):
    """Fails the launch of some number, or its tokens."""

    def __init__(self, failing: int, *, at_launch: bool) -> None:
        super().__init__(CountingModel())
        self._failing = failing
        self._at_launch = at_launch

    def launch(
        self,
        slices: Sequence[SequenceSlice],
        rows: Sequence[SamplingRow],
        source: PendingTokens | None,
    ) -> LateTokens:
        self._failing -= 1
        if self._failing == -1 and self._at_launch:
            raise MemoryError("no memory for that")
        pending = super().launch(slices, rows, source)
        if self._failing == -1:
            pending.error = MemoryError("no memory for that")
        return pending


@pytest.mark.parametrize("at_launch", [True, False], ids=["launch", "result"])
@pytest.mark.parametrize("failing", range(4))
def test_a_failure_ends_its_requests_once_and_nobody_else(failing: int, at_launch: bool) -> None:
    """Tokens of the batch before it are told; of one that went on from it nothing is."""
    expected, run = Run(), Run()
    core = make_core(CountingModel(), overlaps=False)
    add(core, make_request("a"), make_request("b", arrival=1.0))
    expected.finish(core)
    core = make_core(FailingModel(failing, at_launch=at_launch), overlaps=True)
    add(core, make_request("a"))
    for _ in range(failing + 2):  # the failure is known
        run.take(core.step(0.0))
    assert run.reasons == {"a": FinishReason.ERROR}
    assert run.tokens["a"] == expected.tokens["a"][:failing]
    add(core, make_request("b", arrival=1.0))
    run.finish(core)
    assert run.reasons["b"] is FinishReason.LENGTH
    assert run.tokens["b"] == expected.tokens["b"]


def test_a_failed_launch_keeps_those_of_the_batch_before() -> None:
    """Who is only in that one goes on; who is in both has its token, and then the error."""
    model = FailingModel(1, at_launch=True)
    core, run = make_core(model, overlaps=True), Run()
    add(core, make_request("short", max_tokens=1), make_request("long", arrival=1.0))
    run.take(core.step(0.0))
    add(core, make_request("new", arrival=2.0))
    run.take(core.step(0.0))
    assert run.reasons == {
        "short": FinishReason.LENGTH,
        "long": FinishReason.ERROR,
        "new": FinishReason.ERROR,
    }
    assert [len(run.tokens[name]) for name in ("short", "long", "new")] == [1, 1, 0]
    assert not core.is_computing
    run.finish(core)


@dataclass(frozen=True)
class Client:
    """One request, when it comes, and when its client goes away."""

    step: int
    length: int
    max_tokens: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    leaves_after: int | None


clients = st.builds(
    Client,
    step=st.integers(0, 12),
    length=st.integers(1, 20),
    max_tokens=st.integers(1, 14),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(st.integers(0, 96), max_size=16).map(tuple),
    leaves_after=st.none() | st.integers(1, 12),
)


def serve(core: EngineCore, clients: Sequence[Client]) -> Run:
    """Serve all of them; those that leave do so some steps after they came."""
    run = Run()
    for step in range(30):
        for index, client in enumerate(clients):
            if client.step == step:
                sampling = {
                    "max_tokens": client.max_tokens,
                    "min_tokens": min(client.min_tokens, client.max_tokens),
                    "stop_token_ids": client.stop_token_ids,
                    "seed": index,
                }
                add(core, make_request(f"r{index}", client.length, float(step), **sampling))
            elif client.leaves_after is not None and step == client.step + client.leaves_after:
                core.cancel(f"r{index}", 0)
        run.take(core.step(float(step)))
    run.finish(core)
    return run


@given(
    clients=st.lists(clients, min_size=1, max_size=10),
    num_blocks=st.integers(8, 14),
    budget=st.integers(4, 16),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_late_tokens_are_those_of_a_model_that_computes_at_once(
    clients: list[Client], num_blocks: int, budget: int, seed: int
) -> None:
    """Whatever comes and goes, with stop tokens, and with blocks so few that some are preempted."""
    rng = random.Random(seed)
    model = LateModel(CountingModel(), lambda: rng.choice([0, 1, 2, 1000]))
    late = serve(make_core(model, num_blocks, overlaps=True, budget=budget), clients)
    prompt = serve(make_core(CountingModel(), num_blocks, overlaps=False, budget=budget), clients)
    for index, client in enumerate(clients):
        name = f"r{index}"
        tokens, expected = late.tokens.get(name, []), prompt.tokens.get(name, [])
        if client.leaves_after is None:
            assert (tokens, late.reasons[name]) == (expected, prompt.reasons[name])
        else:
            shared = min(len(tokens), len(expected))
            assert tokens[:shared] == expected[:shared]


def test_batches_are_launched_ahead_most_of_the_time() -> None:
    """So that the tests above test it, preemption included."""
    model = LateModel(CountingModel())
    core, run = make_core(model, num_blocks=8, overlaps=True), Run()
    add(core, *(make_request(f"r{i}", 6, float(i), max_tokens=14) for i in range(8)))
    run.finish(core)
    assert core.load().num_preemptions > 0
    assert len(model.launched) / 3 < model.num_ahead < len(model.launched)
