"""Small makers, and a model that proves what the scheduler promises about the KV cache."""

from __future__ import annotations

from services.worker.engine.block_manager import BlockManager, BlockMove
from services.worker.engine.config import SchedulerConfig
from services.worker.engine.cost_model import TOKEN_COUNT, CostModel
from services.worker.engine.outputs import SchedulerOutput, StepResult
from services.worker.engine.request import Request
from services.worker.engine.routes import Route, RouteStage
from services.worker.engine.scheduler import Scheduler
from services.worker.engine.stopping import is_stop_token
from shared.sampling import SamplingParams

BLOCK_SIZE = 4
VOCABULARY = 97


def make_request(
    name: str = "r",
    num_prompt_tokens: int = 4,
    arrival_seconds: float = 0.0,
    output_token_ids: tuple[int, ...] = (),
    eos_token_ids: tuple[int, ...] = (),
    **sampling: object,
) -> Request:
    """A request whose prompt depends on its name, so that no two share their KV."""
    seed = sum(name.encode())
    return Request(
        request_id=name,
        router_id="router",
        attempt=0,
        prompt_token_ids=[(seed * 7 + i) % VOCABULARY for i in range(num_prompt_tokens)],
        output_token_ids=list(output_token_ids),
        sampling=SamplingParams.model_validate({"max_tokens": 8, **sampling}),
        eos_token_ids=frozenset(eos_token_ids),
        arrival_seconds=arrival_seconds,
    )


def make_route(num_stages: int, route_id: str = "pipeline") -> Route:
    """Workers w0, w1, ... with one layer each."""
    return Route(route_id, tuple(RouteStage(f"w{i}", i, i + 1) for i in range(num_stages)))


def make_scheduler(
    num_blocks: int = 16,
    block_size: int = BLOCK_SIZE,
    num_stages: int = 1,
    route: Route | None = None,
    cost_model: CostModel = TOKEN_COUNT,
    **config: float,
) -> tuple[Scheduler, BlockManager]:
    """A scheduler without watermarks, unless given, on a pool of its own.

    With several stages, all of them have as many blocks; with a route given, none are granted yet.
    """
    blocks = BlockManager(num_blocks, block_size)
    limits: dict[str, float] = {
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
        "max_model_len": num_blocks * block_size,
        "watermark": 0.0,
        "recovery_watermark": 0.0,
    }
    settings = SchedulerConfig(**{**limits, **config})  # type: ignore[arg-type]
    scheduler = Scheduler(settings, blocks, route or make_route(num_stages), cost_model)
    for i in range(1, num_stages):
        scheduler.blocks.add_capacity(f"w{i}", num_blocks)
    return scheduler, blocks


def next_token(token_ids: list[int]) -> int:
    """A 'model': the next token depends on every earlier one."""
    state = 1
    for token_id in token_ids:
        state = (state * 31 + token_id + 1) % 1_000_003
    return state % VOCABULARY


def expected_output(request: Request, max_model_len: int) -> list[int]:
    """What an undisturbed run of `request` generates."""
    token_ids, output = list(request.prompt_token_ids), []
    limit = min(request.sampling.max_tokens, max_model_len - len(token_ids))
    for _ in range(limit):
        output.append(next_token([*token_ids, *output]))
        if len(output) >= request.sampling.min_tokens and is_stop_token(request, output[-1]):
            break
    return output


class PagedModel:
    """Computes batches from tokens kept in KV blocks, as the real model does.

    Reads its own input back from the blocks: a block shared by mistake, freed too early or not
    computed gives other tokens, and `compute` fails on it. What it sampled it knows before the
    scheduler does, so batches that were made ahead can be computed before the others return.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._kv: dict[int, int] = {}  # slot -> token id
        self._sampled: dict[tuple[Request, int], int] = {}  # by position

    def compute(self, output: SchedulerOutput) -> list[int]:
        """Write the batch's tokens to their slots; return one new token per row that wants one."""
        sampled = []
        for item in output.scheduled:
            request, end = item.request, item.num_computed_tokens + item.num_scheduled_tokens
            for position in range(item.num_computed_tokens, end):
                self._kv[self._slot(request, position)] = self._token(request, position)
            cached = [self._kv[self._slot(request, position)] for position in range(end)]
            if cached != [self._token(request, position) for position in range(end)]:
                raise AssertionError(f"the KV of {request.request_id} was overwritten")
            if item.wants_token:
                sampled.append(next_token(cached))
                self._sampled[request, end] = sampled[-1]
        return sampled

    def _token(self, request: Request, position: int) -> int:
        if position < request.num_tokens:
            return request.token_ids(position, position + 1)[0]
        return self._sampled[request, position]

    def move(self, moves: list[BlockMove]) -> None:
        """Copy blocks as a shrinking pool demands."""
        for move in moves:
            for offset in range(self._block_size):
                source = move.source * self._block_size + offset
                destination = move.destination * self._block_size + offset
                if source in self._kv:
                    self._kv[destination] = self._kv[source]

    def _slot(self, request: Request, position: int) -> int:
        block = request.block_table[position // self._block_size]
        return block * self._block_size + position % self._block_size


def run_step(scheduler: Scheduler, model: PagedModel, now: float = 0.0) -> list[StepResult]:
    """One whole step: schedule, compute, update."""
    output = scheduler.schedule(now)
    if not output.scheduled:
        return []
    return scheduler.update_from_output(output, model.compute(output))


def run_to_end(scheduler: Scheduler, model: PagedModel, max_steps: int = 10_000) -> None:
    """Step until nothing is left; fail if that takes more than `max_steps`."""
    for _ in range(max_steps):
        if not scheduler.requests:
            return
        run_step(scheduler, model)
        scheduler.check_integrity()
    raise AssertionError(f"{len(scheduler.requests)} requests never finish")
