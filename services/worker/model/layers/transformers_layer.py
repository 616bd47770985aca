"""The Hugging Face decoder layer, run on an arena and on paged KV, on any device.

The module is built on the meta device, where it takes no memory, and gets its parameters here:

    norm weights, vectors   -> views into the arena
    nn.Linear               -> the same, or what a device has in its place
    attention               -> transformers calls `_paged_attention` (AttentionInterface), which
                               finds the layer's KV and the batch in the keyword `paged`

So everything that differs between architectures is transformers' own code; what differs between
devices is in `cpu_transformers.py` and `torch_transformers.py`. It serves what the fused layers do
not, and is the oracle of the CPU's fused layer in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from services.worker.attention.base import PagedAttention
from services.worker.kernels.base import Kernels
from services.worker.kernels.cpu import AttentionBatch
from services.worker.kernels.ops import PagedBatch
from services.worker.model.arena import ArenaLayout, PartSpec
from services.worker.model.config import ModelConfig
from services.worker.model.transformers_config import transformers_config

BatchT = TypeVar("BatchT", AttentionBatch, PagedBatch)

#: Makes what takes the place of an nn.Linear, given the prefix of its parameters' names and the
#: address of the layer's arena.
PlaceLinear = Callable[[nn.Linear, str, int], nn.Module]

_ATTENTION_NAME = "kunpaged"


@dataclass(frozen=True, slots=True)
class _PagedCall(Generic[BatchT]):
    """What attention needs beyond what transformers hands it; travels as the keyword `paged`."""

    attention: PagedAttention[BatchT]
    kv_cache: torch.Tensor  # [blocks, 2, block_size, num_kv_heads, head_dim]
    batch: BatchT


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: None,
    *,
    scaling: float,
    paged: _PagedCall[Any],
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


@dataclass(frozen=True, slots=True)
class TransformersLayer(Generic[BatchT]):
    """A resident layer."""

    module: nn.Module
    attention: PagedAttention[BatchT]
    kv_cache: torch.Tensor  # [blocks, 2, block_size, num_kv_heads, head_dim]
    rotary_dtype: torch.dtype

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: BatchT,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        cos, sin = batch.cos.to(self.rotary_dtype), batch.sin.to(self.rotary_dtype)
        out: torch.Tensor = self.module(
            hidden[None],
            attention_mask=None,
            position_embeddings=(cos[None], sin[None]),
            past_key_values=None,
            use_cache=False,
            paged=_PagedCall(self.attention, self.kv_cache, batch),
        )
        hidden.copy_(out[0])


class TransformersModules:
    """The layers of one model as modules without memory, each placed on an arena on demand."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, place_linear: PlaceLinear | None = None
    ) -> None:
        """Make the modules and the layout of an arena; nn.Linear stays without `place_linear`."""
        model = _meta_model(config).model
        self._modules, self._rotary = model.layers, model.rotary_emb
        self._dtype = kernels.dtype
        self._place_linear = place_linear
        self.layout = ArenaLayout(
            [PartSpec(name, shape, (name,)) for name, shape in layer_shapes(config).items()],
            kernels,
        )

    def make(
        self,
        layer: int,
        arena_address: int,
        kv_cache: torch.Tensor,  # [blocks, 2, block_size, num_kv_heads, head_dim]
        attention: PagedAttention[BatchT],
    ) -> TransformersLayer[BatchT]:
        """Decoder layer `layer` on a filled arena."""
        module: nn.Module = self._modules[layer]
        self._place(module, "", arena_address)
        return TransformersLayer(module, attention, kv_cache, self._rotary_dtype())

    def _place(self, module: nn.Module, prefix: str, arena_address: int) -> None:
        """Give `module` and all below it parameters that lie in the arena."""
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}."
            if self._place_linear is not None and isinstance(child, nn.Linear):
                setattr(module, name, self._place_linear(child, path, arena_address))
            else:
                self._place(child, path, arena_address)
        for name, _ in list(module.named_parameters(recurse=False)):
            view = self.layout.view(arena_address, f"{prefix}{name}")
            setattr(module, name, nn.Parameter(view, requires_grad=False))

    def _rotary_dtype(self) -> torch.dtype:
        """The type of cos and sin in transformers: that of hidden states, but fp32 in OLMo-2.

        The model's own module says so. It cannot be asked on the meta device where frequencies
        change with the prompt's length; `RotaryTable` has refused such a model by then.
        """
        hidden = torch.empty(1, 1, 1, dtype=self._dtype, device="meta")
        cos, _ = self._rotary(hidden, torch.empty(1, 1, device="meta"))
        dtype: torch.dtype = cos.dtype
        return dtype


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
