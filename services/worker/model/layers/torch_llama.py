"""The decoder layer of the Llama family on a CUDA device: four products, and fused rest.

    norm -> qkv product -> rope, KV store -> attention -> o product, added to hidden
    norm -> gate_up product -> silu * up -> down product, added to hidden

The arena is that of `llama.py`, without packing: q, k and v are one matrix, gate and up another.
Additions to the residual happen inside the products (`addmm`), before they are rounded. Nothing
waits for the device and nothing depends on values there, so a layer can be captured in a CUDA
graph. The type is that of the weights; sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.worker.kernels.ops import HeadNorms, LayerOps, PagedBatch
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.arena import ArenaLayout
from services.worker.model.batch import ForwardBatch
from services.worker.model.config import ModelConfig
from services.worker.model.graphs import MAX_SEQS, DecodeGraphs, run_layers
from services.worker.model.layers.llama import layer_parts


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix `[rows, columns]` and, where the model has one, its bias `[rows]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def write_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out = x @ w.T + bias."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """hidden += x @ w.T + bias."""
        if self.bias is not None:
            hidden += self.bias
        hidden.addmm_(x, self.weight.t())


@dataclass(frozen=True, slots=True)
class TorchLlamaWeights:
    """Views into a layer's arena."""

    input_norm: torch.Tensor  # [hidden]
    post_attention_norm: torch.Tensor  # [hidden]
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    head_norms: HeadNorms | None


class Workspace:
    """What a layer needs of memory beside its arguments, for up to `max_num_tokens` tokens.

    Made once, before the budget for weights and KV is taken, so that no batch that the scheduler
    may form runs out of it; all layers use the same.
    """

    def __init__(self, config: ModelConfig, kernels: TorchKernels, max_num_tokens: int) -> None:
        def rows(size: int) -> torch.Tensor:
            return torch.empty(max_num_tokens, size, dtype=kernels.dtype, device=kernels.device)

        heads = config.num_heads * config.head_dim
        self.normed = rows(config.hidden_size)
        self.qkv = rows(heads + 2 * config.num_kv_heads * config.head_dim)
        self.attended = rows(heads)
        self.gate_up = rows(2 * config.intermediate_size)
        self.activated = rows(config.intermediate_size)


@dataclass(frozen=True, slots=True)
class TorchLlamaLayer:
    """A resident layer."""

    config: ModelConfig
    ops: LayerOps
    weights: TorchLlamaWeights
    kv_cache: torch.Tensor  # [blocks, 2, block_size, num_kv_heads, head_dim]
    sliding_window: int
    workspace: Workspace

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: PagedBatch,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        num_tokens, weights, eps = len(hidden), self.weights, self.config.rms_norm_eps
        normed = self.workspace.normed[:num_tokens]
        self.ops.rms_norm(hidden, weights.input_norm, eps, normed)
        weights.o.add_to(hidden, self._attend(normed, batch))
        self.ops.rms_norm(hidden, weights.post_attention_norm, eps, normed)
        gate_up = self.workspace.gate_up[:num_tokens]
        weights.gate_up.write_to(gate_up, normed)
        activated = self.workspace.activated[:num_tokens]
        self.ops.silu_mul(gate_up, activated)
        weights.down.add_to(hidden, activated)

    def _attend(self, normed: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """What all heads give `[num_tokens, num_heads * head_dim]`."""
        shape = (len(normed), self.config.num_heads, self.config.head_dim)
        qkv = self.workspace.qkv[: len(normed)]
        self.weights.qkv.write_to(qkv, normed)
        self.ops.rope_and_store(qkv, batch, self.weights.head_norms, self.kv_cache)
        attended = self.workspace.attended[: len(normed)]
        query = qkv[:, : attended.shape[1]].view(shape)
        scale = self.config.head_dim**-0.5
        self.ops.attention(
            query, self.kv_cache, batch, scale, self.sliding_window, attended.view(shape)
        )
        return attended


class TorchLlamaLayers:
    """The layers of one model of the family. Implements `DecoderLayers`."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: TorchKernels,
        graphs: DecodeGraphs | None,
        max_num_tokens: int,
    ) -> None:
        """Run batches of single tokens with `graphs`, where there are some that serve them.

        Args:
            max_num_tokens: of any batch.
        """
        self._workspace = Workspace(config, kernels, max(max_num_tokens, MAX_SEQS))
        self._config = config
        self._graphs = graphs
        self._ops = kernels.ops
        self._layout = ArenaLayout(layer_parts(config), kernels)

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer."""
        return self._layout

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> TorchLlamaLayer:
        """Decoder layer `layer` on a filled arena."""
        return TorchLlamaLayer(
            self._config,
            self._ops,
            _weights(self._config, self._layout, arena_address),
            kv_cache,
            self._config.window_of_layer(layer) or 0,
            self._workspace,
        )

    def run(
        self,
        layers: Sequence[TorchLlamaLayer],
        start: int,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: ForwardBatch,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, the halves equal
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
    ) -> None:
        """Run neighbouring layers; writes the batch's KV."""
        forwards = [layer.forward for layer in layers]
        run_layers(forwards, start, hidden, PagedBatch.of(batch, cos, sin), self._graphs)


def _weights(config: ModelConfig, layout: ArenaLayout, arena_address: int) -> TorchLlamaWeights:
    def part(name: str) -> torch.Tensor:
        return layout.view(arena_address, name)

    def projection(name: str, has_bias: bool) -> Projection:
        return Projection(part(f"{name}_proj"), part(f"{name}_bias") if has_bias else None)

    norms = None
    if config.qk_norm:
        norms = HeadNorms(part("q_norm"), part("k_norm"), config.rms_norm_eps)
    return TorchLlamaWeights(
        input_norm=part("input_norm"),
        post_attention_norm=part("post_attention_norm"),
        qkv=projection("qkv", config.qkv_bias),
        o=projection("o", config.o_bias),
        gate_up=projection("gate_up", config.mlp_bias),
        down=projection("down", config.mlp_bias),
        head_norms=norms,
    )
