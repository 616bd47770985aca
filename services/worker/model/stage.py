"""A stage: the layers `[start, end)` of the model that this worker holds, and how to run them.

    token ids -embedding-> hidden -layer start-> ... -layer end-1-> hidden -norm, head-> logits
              (start == 0)                                          (end == num_layers)

Each layer's weights lie in an arena of their own and each layer's KV in a range of its own, so a
layer can leave and come back without anything else moving. Several stages in a row compute exactly
what one whole stage computes: a layer does not know who ran the layer before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.kernels.library import LayerGeometry, LlamaLayerWeights
from services.worker.memory.pool import MemoryPool
from services.worker.memory.tensors import tensor_at
from services.worker.model.arena import ArenaLayout, PartSpec
from services.worker.model.batch import ForwardBatch
from services.worker.model.checkpoint import Checkpoint
from services.worker.model.config import ModelConfig
from services.worker.model.llama import layer_geometry, layer_parts, layer_weights
from services.worker.model.rotary import RotaryTable
from shared.layout import Span

_EMBEDDING = "embedding"
_FINAL_NORM = "final_norm"
_LM_HEAD = "lm_head"
_TABLE = "table"


@dataclass(frozen=True, slots=True)
class _Layer:
    """A resident layer: what the kernel needs to run it."""

    geometry: LayerGeometry
    weights: LlamaLayerWeights
    kv_address: int


class StagePlan:
    """Which arenas a span needs and how large they are; computed before any memory is taken."""

    def __init__(self, config: ModelConfig, span: Span, kernels: CpuKernels) -> None:
        self.config = config
        self.span = span
        self._block_size = kernels.block_size
        self._layer_layout = ArenaLayout(layer_parts(config), kernels)
        table = PartSpec(_TABLE, (config.vocab_size, config.hidden_size), (_TABLE,))
        norm = PartSpec(_TABLE, (config.hidden_size,), (_TABLE,))
        self._table_layout = ArenaLayout([table], kernels)
        self._norm_layout = ArenaLayout([norm], kernels)

    @property
    def layouts(self) -> dict[str, ArenaLayout]:
        """The arenas of the span by name, in the order they are loaded."""
        layouts = {layer_name(layer): self._layer_layout for layer in self.layers}
        if self.is_first or self.config.tie_word_embeddings:
            layouts[_EMBEDDING] = self._table_layout
        if self.is_last:
            layouts[_FINAL_NORM] = self._norm_layout
            if not self.config.tie_word_embeddings:
                layouts[_LM_HEAD] = self._table_layout
        return layouts

    @property
    def is_first(self) -> bool:
        return self.span.start == 0

    @property
    def is_last(self) -> bool:
        return self.span.end == self.config.num_layers

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block of one layer, `[2, block_size, kv_heads, head_dim]` float32."""
        return 4 * 2 * self._block_size * self.config.num_kv_heads * self.config.head_dim

    @property
    def layers(self) -> range:
        return range(self.span.start, self.span.end)


def layer_name(layer: int) -> str:
    """Name of a decoder layer's arena."""
    return f"layer.{layer}"


class Stage:
    """The layers of one span in the memory of a pool. Not thread-safe."""

    def __init__(
        self,
        plan: StagePlan,
        checkpoint: Checkpoint,
        pool: MemoryPool,
        kernels: CpuKernels,
        rotary: RotaryTable,
        max_num_tokens: int,
    ) -> None:
        """Reserve the KV ranges; nothing is loaded before `load`."""
        self._plan = plan
        self._config = plan.config
        self._checkpoint = checkpoint
        self._pool = pool
        self._kernels = kernels
        self._rotary = rotary
        self._addresses: dict[str, int] = {}
        self._layers: dict[int, _Layer] = {}
        self._kv = {layer: pool.kv_region(layer, plan.kv_block_bytes) for layer in plan.layers}
        self._workspace = torch.empty(
            kernels.llama_layer_workspace_nbytes(
                layer_geometry(plan.config, plan.span.start), max_num_tokens
            ),
            dtype=torch.uint8,
        )

    @property
    def span(self) -> Span:
        return self._plan.span

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self._plan.kv_block_bytes

    def load(self) -> Iterator[str]:
        """Map and fill every arena of the span; yields the name of each when it is there.

        Raises:
            CheckpointError: a tensor cannot be read.
            OutOfChunksError: the pool is too small.
        """
        for name, layout in self._plan.layouts.items():
            arena = self._pool.weight_arena(name, layout.nbytes)
            self._addresses[name] = arena.address
            layout.fill(arena.address, self._tensors(name))
            yield name
        for layer, region in self._kv.items():
            layout = self._plan.layouts[layer_name(layer)]
            self._layers[layer] = _Layer(
                layer_geometry(self._config, layer),
                layer_weights(layout, self._addresses[layer_name(layer)]),
                region.address,
            )

    def _tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """The checkpoint's tensors for an arena, float32."""
        match name:
            case "embedding":
                return {_TABLE: self._checkpoint.embedding(torch.float32)}
            case "final_norm":
                return {_TABLE: self._checkpoint.final_norm(torch.float32)}
            case "lm_head":
                return {_TABLE: self._checkpoint.lm_head(torch.float32)}
        return self._checkpoint.layer(int(name.removeprefix("layer.")), torch.float32)

    # --- running ---------------------------------------------------------------------------------

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[num_tokens, hidden]` of `token_ids` `[num_tokens]`; first stage only."""
        hidden = torch.empty(token_ids.numel(), self._config.hidden_size)
        table = self._addresses[_EMBEDDING]
        self._kernels.embedding(table, self._config.vocab_size, token_ids, hidden)
        return hidden

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """Run the span's layers; writes the batch's KV. Returns `hidden` `[num_tokens, hidden]`."""
        cos, sin = self._rotary.rows(batch.positions)
        attention = AttentionBatch(
            cos=cos,
            sin=sin,
            slot_mapping=batch.slot_mapping,
            block_table=batch.block_table,
            cu_seqlens_q=batch.cu_seqlens_q,
            seqused_k=batch.seqused_k,
        )
        for layer in self._plan.layers:
            resident = self._layers[layer]
            self._kernels.llama_layer(
                hidden,
                resident.kv_address,
                resident.geometry,
                resident.weights,
                attention,
                self._workspace,
            )
        return hidden

    def logits(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden]
        rows: torch.Tensor,  # [num_logits] int64
    ) -> torch.Tensor:  # [num_logits, vocab]
        """Logits of the given rows; last stage only."""
        config = self._config
        selected = hidden[rows]
        norm = tensor_at(self._addresses[_FINAL_NORM], (config.hidden_size,))
        self._kernels.rms_norm(selected, norm, config.rms_norm_eps, selected)
        head = self._addresses[_EMBEDDING if config.tie_word_embeddings else _LM_HEAD]
        logits = torch.empty(rows.numel(), config.vocab_size)
        self._kernels.linear(selected, head, config.vocab_size, logits)
        return logits
