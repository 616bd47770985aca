"""The Hugging Face decoder layer on the CPU: our GEMM for its matrices, our attention.

Rows stay independent of their neighbours: matrix products and attention are our kernels, norms
reduce one row at a time, and rotary embedding is products and sums, which are exactly rounded
anywhere. Activations are evaluated by torch in vectors over the flat tensor and the rest of it one
by one, in other bits; `intermediate_size` must therefore be a multiple of the widest vector loop,
and torch must run with one thread (`services/worker/build.py`), so that there never is a rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from services.worker.attention.cpu import CpuAttention
from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.model.arena import ArenaLayout
from services.worker.model.batch import ForwardBatch
from services.worker.model.config import ModelConfig
from services.worker.model.layers.cpu_batch import attention_batch
from services.worker.model.layers.transformers_layer import TransformersLayer, TransformersModules
from shared.errors import ConfigError

#: Elements of torch's widest vector loop: two registers of AVX-512.
_ACTIVATION_MULTIPLE = 32


class PackedLinear(nn.Module):
    """Takes the place of nn.Linear: the matrix is packed in an arena."""

    def __init__(
        self, kernels: CpuKernels, address: int, rows: int, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self._address = address
        self._rows = rows
        self._bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, tokens, k] -> [1, tokens, rows]
        """x @ w.T + bias."""
        out = torch.empty(1, x.shape[1], self._rows)
        self._kernels.linear(x[0].contiguous(), self._address, self._rows, out[0], bias=self._bias)
        return out


class CpuTransformersLayers:
    """The layers of one model. Implements `DecoderLayers`."""

    def __init__(self, config: ModelConfig, kernels: CpuKernels) -> None:
        """Raises ConfigError where results would depend on the batch (see the module's text)."""
        if config.intermediate_size % _ACTIVATION_MULTIPLE:
            raise ConfigError(
                f"an intermediate_size of {config.intermediate_size} is not supported for"
                f" {config.architecture} on the CPU; it must be a multiple of"
                f" {_ACTIVATION_MULTIPLE}"
            )
        self._kernels = kernels
        self._attention = CpuAttention(kernels)
        self._modules = TransformersModules(config, kernels, self._packed_linear)

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer."""
        return self._modules.layout

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> TransformersLayer[AttentionBatch]:
        """Decoder layer `layer` on a filled arena."""
        return self._modules.make(layer, arena_address, kv_cache, self._attention)

    def run(
        self,
        layers: Sequence[TransformersLayer[AttentionBatch]],
        start: int,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: ForwardBatch,
        cos: torch.Tensor,  # [num_tokens, head_dim] fp32, the halves equal
        sin: torch.Tensor,  # [num_tokens, head_dim] fp32
    ) -> None:
        """Run neighbouring layers; writes the batch's KV."""
        step = attention_batch(batch, cos, sin)
        for layer in layers:
            layer.forward(hidden, step)

    def _packed_linear(self, linear: nn.Linear, path: str, arena_address: int) -> PackedLinear:
        layout = self.layout
        return PackedLinear(
            self._kernels,
            layout.address(arena_address, f"{path}weight"),
            linear.out_features,
            None if linear.bias is None else layout.view(arena_address, f"{path}bias"),
        )
