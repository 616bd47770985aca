"""A look into the engine: who has its memory and its blocks, and whether the books agree.

Made in the engine thread on demand (`GET /debug/engine`), for operators and tests. What does not
agree is a fault in the worker; it is shown, and ends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.worker.engine.block_manager import BlockIntegrityError
from services.worker.engine.scheduler import Scheduler
from services.worker.memory.errors import LedgerIntegrityError
from services.worker.model.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class EngineInspection:
    """What one engine holds at one moment.

    Attributes:
        fault: where the books do not agree; empty if they do.
        requests: unfinished requests of its own scheduler.
        batches_in_flight: batches in pipelines that it leads, or launched here.
        blocks_total, blocks_used: of its pool, whoever uses them.
        blocks_granted: that other leaders may book here, those in use included.
        keys_held: requests of other leaders with blocks here.
        weight_bytes, kv_bytes, free_bytes: whole chunks; they add up to `budget_bytes`.
    """

    fault: str
    requests: int
    batches_in_flight: int
    blocks_total: int
    blocks_used: int
    blocks_granted: int
    keys_held: int
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    budget_bytes: int


def inspect_engine(scheduler: Scheduler, runner: ModelRunner) -> EngineInspection:
    """Look at everything, and check it. Engine thread only."""
    stage, usage = scheduler.blocks.stage, runner.pool.usage
    return EngineInspection(
        fault=_fault(scheduler, runner),
        requests=len(scheduler.requests),
        batches_in_flight=scheduler.num_batches_in_flight,
        blocks_total=runner.num_blocks,
        blocks_used=scheduler.blocks.num_local_used,
        blocks_granted=stage.num_granted_blocks,
        keys_held=len(stage.keys),
        weight_bytes=usage.weight_bytes,
        kv_bytes=usage.kv_bytes,
        free_bytes=usage.free_bytes,
        budget_bytes=runner.pool.budget_bytes,
    )


def _fault(scheduler: Scheduler, runner: ModelRunner) -> str:
    try:
        scheduler.check_integrity()
        runner.pool.check_integrity()
    except (BlockIntegrityError, LedgerIntegrityError) as error:
        return str(error)
    return ""
