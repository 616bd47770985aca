"""What a loaded model tells about its worker."""

from __future__ import annotations

from services.worker.identity import ModelFacts
from services.worker.model.runner import ModelRunner


def model_facts(runner: ModelRunner) -> ModelFacts:
    """What a worker's lease says of its model and memory, as they are now."""
    usage = runner.pool.usage
    layers = runner.resident_layers
    return ModelFacts(
        num_layers=runner.config.num_layers,
        vocab_size=runner.config.vocab_size,
        max_model_len=runner.max_model_len,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        kv_block_bytes=runner.kv_block_bytes * sum(map(len, layers)),
        memory_bytes=runner.pool.budget_bytes,
        weight_bytes=usage.weight_bytes,
        kv_bytes=usage.kv_bytes,
        free_bytes=usage.free_bytes,
        layers=layers,
    )
