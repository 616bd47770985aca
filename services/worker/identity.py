"""What a worker is, for its lease and for everything it sends."""

from __future__ import annotations

from dataclasses import dataclass

from shared.layout import Span
from shared.messages import ModelCosts, WorkerInfo, WorkerState


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the loaded model tells about this worker; figures are bytes of the device."""

    device: str
    dtype: str
    num_layers: int
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    kv_block_bytes: int
    memory_bytes: int
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    layers: tuple[Span, ...]
    costs: ModelCosts


@dataclass(frozen=True, slots=True)
class Identity:
    """The unchanging part of a worker's lease."""

    worker_id: str
    incarnation: str
    host: str
    pid: int
    model_id: str
    started_at: float

    def info(self, facts: ModelFacts, state: WorkerState, applied_epoch: int) -> WorkerInfo:
        """The lease as it stands now."""
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            host=self.host,
            pid=self.pid,
            state=state,
            model_id=self.model_id,
            num_layers=facts.num_layers,
            max_model_len=facts.max_model_len,
            device=facts.device,
            dtype=facts.dtype,
            block_size=facts.block_size,
            kv_block_bytes=facts.kv_block_bytes,
            memory_bytes=facts.memory_bytes,
            weight_bytes=facts.weight_bytes,
            kv_bytes=facts.kv_bytes,
            free_bytes=facts.free_bytes,
            layers=facts.layers,
            costs=facts.costs,
            applied_epoch=applied_epoch,
            started_at=self.started_at,
        )
