"""What a loaded model tells about its worker."""

from __future__ import annotations

from services.worker.engine.cost_model import ChunkShape
from services.worker.identity import ModelFacts
from services.worker.model.runner import ModelRunner
from shared.messages import ModelCosts

#: The batch whose time is told. It stands for what pipelines compute during a burst: requests of
#: BurstGPT have 642 tokens of prompt and 262 of output on average, and only these need the head.
_TYPICAL_ROWS = 16
_TYPICAL_BATCH = (*(ChunkShape(256, 1),) * _TYPICAL_ROWS, ChunkShape(0, 40))


def model_facts(runner: ModelRunner) -> ModelFacts:
    """What a worker's lease says of its model and memory, as they are now."""
    usage = runner.pool.usage
    layers = runner.resident_layers
    return ModelFacts(
        device=runner.device.type,
        dtype=str(runner.dtype).removeprefix("torch."),
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
        costs=_model_costs(runner),
    )


def _model_costs(runner: ModelRunner) -> ModelCosts:
    part_bytes, profile = runner.part_bytes, runner.profile
    costs = ModelCosts(
        layer_weight_bytes=part_bytes.layer,
        embedding_weight_bytes=part_bytes.embedding,
        head_weight_bytes=part_bytes.head,
        whole_weight_bytes=part_bytes.whole,
        kv_layer_block_bytes=runner.kv_block_bytes,
        chunk_bytes=runner.pool.chunk_bytes,
    )
    if profile is None:
        return costs
    seconds = {
        "layer_seconds": profile.layer.batch_cost(_TYPICAL_BATCH),
        "embedding_seconds": profile.embedding.seconds(_TYPICAL_ROWS),
        "head_seconds": profile.head.seconds(_TYPICAL_ROWS),
    }
    return costs.model_copy(update=seconds)
