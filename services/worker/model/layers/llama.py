"""The decoder layer of the Llama family (Llama, Mistral, Qwen2, Qwen3), fused and packed.

    arena:  norms | qkv = [q; k; v] rows | o | gate_up = [gate; up] rows | down | biases

One call of `llama_layer` in `services/worker/kernels` computes it. The Hugging Face layer of the
same configuration is its oracle in `tests/unit/model/test_stage.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.worker.kernels.cpu import AttentionBatch, CpuKernels
from services.worker.kernels.library import LayerGeometry, LlamaLayerWeights
from services.worker.model.arena import ArenaLayout, PartSpec
from services.worker.model.batch import ForwardBatch
from services.worker.model.config import ModelConfig
from services.worker.model.layers.cpu_batch import attention_batch

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_O = ("self_attn.o_proj",)
_DOWN = ("mlp.down_proj",)


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """A resident layer."""

    kernels: CpuKernels
    geometry: LayerGeometry
    weights: LlamaLayerWeights
    kv_address: int
    workspace: torch.Tensor  # bytes, shared by all layers

    def forward(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden], overwritten with the result
        batch: AttentionBatch,
    ) -> None:
        """Run the layer; writes the KV of the batch's tokens."""
        self.kernels.llama_layer(
            hidden, self.kv_address, self.geometry, self.weights, batch, self.workspace
        )


class LlamaLayers:
    """The layers of one model of the family. Implements `DecoderLayers`."""

    def __init__(self, config: ModelConfig, kernels: CpuKernels, max_num_tokens: int) -> None:
        self._config = config
        self._kernels = kernels
        self._layout = ArenaLayout(layer_parts(config), kernels)
        self._workspace = torch.empty(
            kernels.llama_layer_workspace_nbytes(layer_geometry(config, 0), max_num_tokens),
            dtype=torch.uint8,
        )

    @property
    def layout(self) -> ArenaLayout:
        """The arena of a layer."""
        return self._layout

    def run(
        self,
        layers: Sequence[LlamaLayer],
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
    ) -> LlamaLayer:
        """Decoder layer `layer` on a filled arena."""
        return LlamaLayer(
            self._kernels,
            layer_geometry(self._config, layer),
            layer_weights(self._layout, arena_address),
            kv_cache.data_ptr(),
            self._workspace,
        )


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a layer in the checkpoint by its short name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def layer_parts(config: ModelConfig) -> list[PartSpec]:
    """The tensors of one layer's arena; sources are the checkpoint's short names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    qkv_rows = heads + 2 * config.num_kv_heads * config.head_dim
    parts = [
        PartSpec("input_norm", (hidden,), ("input_layernorm.weight",)),
        PartSpec("post_attention_norm", (hidden,), ("post_attention_layernorm.weight",)),
        _matrix("qkv_proj", (qkv_rows, hidden), _QKV),
        _matrix("o_proj", (hidden, heads), _O),
        _matrix("gate_up_proj", (2 * inner, hidden), _GATE_UP),
        _matrix("down_proj", (hidden, inner), _DOWN),
    ]
    if config.qkv_bias:
        parts.append(_bias("qkv_bias", qkv_rows, _QKV))
    if config.o_bias:
        parts.append(_bias("o_bias", hidden, _O))
    if config.mlp_bias:
        parts.append(_bias("gate_up_bias", 2 * inner, _GATE_UP))
        parts.append(_bias("down_bias", hidden, _DOWN))
    if config.qk_norm:
        parts.append(PartSpec("q_norm", (config.head_dim,), ("self_attn.q_norm.weight",)))
        parts.append(PartSpec("k_norm", (config.head_dim,), ("self_attn.k_norm.weight",)))
    return parts


def _matrix(name: str, shape: tuple[int, int], modules: tuple[str, ...]) -> PartSpec:
    return PartSpec(name, shape, tuple(f"{module}.weight" for module in modules))


def _bias(name: str, rows: int, modules: tuple[str, ...]) -> PartSpec:
    return PartSpec(name, (rows,), tuple(f"{module}.bias" for module in modules))


def layer_weights(layout: ArenaLayout, base_address: int) -> LlamaLayerWeights:
    """Addresses of the layer's tensors in an arena at `base_address`; absent ones are null."""
    names = [field[0] for field in LlamaLayerWeights._fields_]
    return LlamaLayerWeights(**{name: layout.address(base_address, name) for name in names})


def layer_geometry(config: ModelConfig, layer: int) -> LayerGeometry:
    """Dimensions of decoder layer `layer` for the kernels."""
    return LayerGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        sliding_window=config.window_of_layer(layer) or 0,
        rms_norm_eps=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
    )
