"""The Hugging Face decoder layer, run on an arena and on paged KV.

The module is built on the meta device, where it takes no memory, and gets its parameters here:

    nn.Linear               -> PackedLinear on a packed matrix of the arena
    norm weights, vectors   -> views into the arena
    attention               -> transformers calls `_paged_attention` (AttentionInterface), which
                               finds the layer's KV and the batch in the keyword `paged`

So everything that differs between architectures is transformers' own code. It serves what the fused
layer does not, and is the fused layer's oracle in the tests.

Rows stay independent of their neighbours: matrix products and attention are our kernels, norms
reduce one row at a time, and rotary embedding is products and sums, which are exactly rounded
anywhere. Activations are evaluated by torch in vectors over the flat tensor and the rest of it one
by one, in other bits; `intermediate_size` must therefore be a multiple of the widest vector loop,
and torch must run with one thread (`services/worker/build.py`), so that there never is a rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from services.worker.attention.base import PagedAttention
from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.memory.tensors import tensor_at
from services.worker.model.arena import ArenaLayout, PartSpec
from services.worker.model.batch import ForwardBatch
from services.worker.model.config import ModelConfig
from services.worker.model.layers.cpu_batch import attention_batch
from services.worker.model.transformers_config import transformers_config
from shared.errors import ConfigError

_ATTENTION_NAME = "kunpaged"

#: Elements of torch's widest vector loop: two registers of AVX-512.
_ACTIVATION_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class _PagedCall:
    """What attention needs beyond what transformers hands it; travels as the keyword `paged`."""

    attention: PagedAttention
    kv_cache: torch.Tensor  # [blocks, 2, block_size, num_kv_heads, head_dim]
    batch: AttentionBatch


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: None,
    *,
    scaling: float,
    paged: _PagedCall,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:  # [1, num_tokens, num_heads, head_dim]
    """Transformers' attention function under the name "kunpaged"."""
    out = paged.attention.forward(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        paged.kv_cache,
        paged.batch,
        scale=scaling,
        sliding_window=sliding_window,
    )
    return out[None], None


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


class TransformersLayer:
    """A resident layer."""

    def __init__(
        self, module: nn.Module, attention: PagedAttention, kv_cache: torch.Tensor
    ) -> None:
        self._module = module
        self._attention = attention
        self._kv_cache = kv_cache

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: AttentionBatch,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        out: torch.Tensor = self._module(
            hidden[None],
            attention_mask=None,
            position_embeddings=(batch.cos[None], batch.sin[None]),
            past_key_values=None,
            use_cache=False,
            paged=_PagedCall(self._attention, self._kv_cache, batch),
        )
        hidden.copy_(out[0])


class TransformersLayers:
    """The layers of one model. Implements `DecoderLayers`."""

    def __init__(self, config: ModelConfig, attention: PagedAttention, kernels: CpuKernels) -> None:
        """Raises ConfigError where results would depend on the batch (see the module's text)."""
        if config.intermediate_size % _ACTIVATION_MULTIPLE:
            raise ConfigError(
                f"an intermediate_size of {config.intermediate_size} is not supported for"
                f" {config.architecture}; it must be a multiple of {_ACTIVATION_MULTIPLE}"
            )
        self._kernels = kernels
        self._attention = attention
        self._modules = _meta_model(config).model.layers
        self._layout = ArenaLayout(
            [PartSpec(name, shape, (name,)) for name, shape in layer_shapes(config).items()],
            kernels,
        )

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer."""
        return self._layout

    def run(
        self,
        layers: Sequence[TransformersLayer],
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

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
    ) -> TransformersLayer:
        """Decoder layer `layer` on a filled arena."""
        module: nn.Module = self._modules[layer]
        self._place(module, "", arena_address)
        return TransformersLayer(module, self._attention, kv_cache)

    def _place(self, module: nn.Module, prefix: str, arena_address: int) -> None:
        """Give `module` and all below it parameters that lie in the arena."""
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}."
            if isinstance(child, nn.Linear):
                setattr(module, name, self._packed_linear(child, path, arena_address))
            else:
                self._place(child, path, arena_address)
        for name, parameter in list(module.named_parameters(recurse=False)):
            view = self._vector(f"{prefix}{name}", parameter, arena_address)
            setattr(module, name, nn.Parameter(view, requires_grad=False))

    def _packed_linear(self, linear: nn.Linear, path: str, arena_address: int) -> PackedLinear:
        bias = linear.bias
        return PackedLinear(
            self._kernels,
            self._layout.address(arena_address, f"{path}weight"),
            linear.out_features,
            None if bias is None else self._vector(f"{path}bias", bias, arena_address),
        )

    def _vector(self, name: str, like: torch.Tensor, arena_address: int) -> torch.Tensor:
        return tensor_at(self._layout.address(arena_address, name), like.shape)


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a layer in the checkpoint by its short name."""
    layer = _meta_model(config).model.layers[0]
    return {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}


def _meta_model(config: ModelConfig) -> Any:
    """The whole model without memory, with our attention."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION_NAME, _paged_attention)
    hf_config = transformers_config(config.raw, config.architecture)
    auto_class: Any = AutoModelForCausalLM  # untyped in transformers
    with torch.device("meta"):
        model = auto_class.from_config(hf_config, attn_implementation=_ATTENTION_NAME)
    return model.eval()
