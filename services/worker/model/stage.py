"""A stage: the layers of a span of the model that this worker holds, and how to run them.

    token ids -embedding-> hidden -layer start-> ... -layer end-1-> hidden -norm, head-> logits
              (start == 0)                                          (end == num_layers)

Each layer's weights lie in an arena of their own and each layer's KV in a range of its own, so a
layer can leave and come back without anything else moving. Several stages in a row compute exactly
what one whole stage computes: a layer does not know who ran the layer before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from services.worker.kernels.base import Kernels
from services.worker.memory.pool import MemoryPool
from services.worker.memory.tensors import tensor_at
from services.worker.model.arena_source import ArenaSource, CheckpointSource
from services.worker.model.batch import ForwardBatch
from services.worker.model.checkpoint import EMBEDDING, FINAL_NORM, WeightSource
from services.worker.model.plan import ArenaPlan, ModelPlan
from services.worker.model.rotary import RotaryTable
from shared.layout import Span


class Stage:
    """The layers of one span, or of a part of it, in the memory of a pool. Not thread-safe."""

    def __init__(
        self,
        plan: ModelPlan,
        span: Span,
        weights: WeightSource,
        pool: MemoryPool,
        kernels: Kernels,
    ) -> None:
        """Reserve the KV ranges of `span`, the most this stage will ever hold; loads nothing.

        Raises:
            ConfigError: the model's rotary embedding is not served.
        """
        self.span = span
        self._plan = plan
        self._config = plan.config
        self._weights = weights
        self.checkpoint_source = CheckpointSource(weights)
        self._pool = pool
        self._kernels = kernels
        self._rotary = RotaryTable(plan.config, kernels.device)
        self._addresses: dict[str, int] = {}  # of every arena ever loaded; they never move
        self._resident: set[str] = set()  # arenas that are mapped and filled
        self._layers: dict[int, Any] = {}  # resident ones
        #: Rises whenever an arena comes or goes.
        self.num_changes = 0
        max_blocks = pool.budget_bytes // plan.kv_block_bytes
        self._kv_caches: dict[int, torch.Tensor] = {}
        for layer in range(span.start, span.end):
            region = pool.kv_region(layer, plan.kv_block_bytes)
            self._kv_caches[layer] = tensor_at(
                region.address, (max_blocks, *plan.kv_block_shape), kernels.dtype, kernels.device
            )

    # --- weights come and go ---------------------------------------------------------------------

    def load(self, span: Span, source: ArenaSource | None = None) -> Iterator[int]:
        """Load what running `span` needs and is not here; yields the bytes of each piece.

        Args:
            source: where from; None: the checkpoint. It may yield 0, for none now.

        Layers are usable one by one, all when the iterator is exhausted. Where it is closed before,
        the arena under way stays unusable and goes with the next `drop`.

        Raises:
            CheckpointError: a tensor cannot be read.
            OutOfChunksError: too little of the pool is free.
        """
        try:
            for arena in self._plan.arenas(span):
                if arena.name not in self._resident:
                    yield from self._load_arena(arena, source or self.checkpoint_source)
        finally:
            self._weights.release()

    def drop(self, span: Span) -> None:
        """Give up every arena that running `span` alone does not need; KV stays as it is."""
        kept = {arena.name for arena in self._plan.arenas(span)}
        for arena in self._plan.arenas(self.span):
            if arena.name in self._addresses and arena.name not in kept:
                self._resident.discard(arena.name)
                self.num_changes += 1
                if arena.layer is not None:
                    self._layers.pop(arena.layer, None)
                self._pool.drop_arena(arena.name)

    def _load_arena(self, arena: ArenaPlan, source: ArenaSource) -> Iterator[int]:
        if arena.name in self._addresses:
            self._pool.restore_arena(arena.name)
        else:
            mapped = self._pool.weight_arena(arena.name, arena.layout.nbytes)
            self._addresses[arena.name] = mapped.address
        address = self._addresses[arena.name]
        yield from source.fill(arena, address)
        if arena.layer is not None:
            self._layers[arena.layer] = self._plan.layers.make(
                arena.layer, address, self._kv_caches[arena.layer]
            )
        self._resident.add(arena.name)
        self.num_changes += 1

    def arena_names(self, span: Span) -> list[str]:
        """The arenas that running `span` needs."""
        return [arena.name for arena in self._plan.arenas(span)]

    def arena_bytes(self, name: str) -> torch.Tensor | None:  # [nbytes] uint8
        """The memory of an arena that is loaded, else None."""
        if name not in self._resident:
            return None
        arena = next(each for each in self._plan.arenas(self.span) if each.name == name)
        shape = (arena.layout.nbytes,)
        return tensor_at(self._addresses[name], shape, torch.uint8, self.device)

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._kernels.device

    @property
    def panel_width(self) -> int:
        """How matrices are packed: arenas are alike where this is."""
        return self._kernels.panel_width

    def kv_cache(self, layer: int) -> torch.Tensor:
        """KV of a layer `[max_blocks, *kv_block_shape]`; only mapped blocks may be touched."""
        return self._kv_caches[layer]

    @property
    def resident_layers(self) -> tuple[Span, ...]:
        """The layers whose weights are here, as few spans as they make."""
        layers = sorted(self._layers)
        starts = [layer for layer in layers if layer - 1 not in self._layers]
        ends = [layer + 1 for layer in layers if layer + 1 not in self._layers]
        return tuple(Span(start=start, end=end) for start, end in zip(starts, ends, strict=True))

    # --- running ---------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden]` of `token_ids` `[num_tokens]`; first stage only."""
        hidden = torch.empty(
            token_ids.numel(),
            self._config.hidden_size,
            dtype=self._kernels.dtype,
            device=self._kernels.device,
        )
        table = self._part(self._plan.embedding, EMBEDDING)
        self._kernels.embedding(table, self._config.vocab_size, token_ids, hidden)
        return hidden

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: ForwardBatch,
        span: Span,
    ) -> None:
        """Run the layers of `span`; writes the batch's KV.

        Raises:
            ValueError: a layer of `span` is not loaded.
        """
        cos, sin = self._rotary.rows(batch.positions, batch.end_position)
        missing = set(range(span.start, span.end)) - self._layers.keys()
        if missing:
            raise ValueError(f"layer {min(missing)} is not loaded")
        layers = [self._layers[layer] for layer in range(span.start, span.end)]
        self._plan.layers.run(layers, span.start, hidden, batch, cos, sin)

    def logits(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden]
        rows: torch.Tensor,  # [num_logits] int64
    ) -> torch.Tensor:  # [num_logits, vocab] float32
        """Logits of the given rows; last stage only."""
        config, head = self._config, self._plan.head
        selected = hidden[rows]
        norm = head.layout.view(self._base(head), FINAL_NORM)
        self._kernels.rms_norm(selected, norm, config.rms_norm_eps, selected)
        logits = torch.empty(rows.numel(), config.vocab_size, device=self._kernels.device)
        matrix = self._part(head, self._plan.head_matrix)
        self._kernels.linear(selected, matrix, config.vocab_size, logits)
        return logits

    def _part(self, arena: ArenaPlan, name: str) -> int:
        """Address of a part of an outer arena."""
        return arena.layout.address(self._base(arena), name)

    def _base(self, arena: ArenaPlan) -> int:
        """Address of an outer arena."""
        if arena.name not in self._resident:
            raise ValueError(f"the arena {arena.name!r} is not loaded")
        return self._addresses[arena.name]
