"""Which implementation serves the decoder layers of a model: fused where there is one."""

from __future__ import annotations

from typing import Any

from services.worker.kernels.cpu import MAX_HEAD_DIM, MAX_HEADS_PER_KV_HEAD, CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.config import ModelConfig
from services.worker.model.graphs import CudaCapture, DecodeGraphs
from services.worker.model.layers import llama, transformers_layer
from services.worker.model.layers.base import DecoderLayers
from services.worker.model.layers.cpu_transformers import CpuTransformersLayers
from services.worker.model.layers.llama import LlamaLayers
from services.worker.model.layers.torch_llama import TorchLlamaLayers
from services.worker.model.layers.torch_transformers import TorchTransformersLayers
from shared.errors import ConfigError

_HEAD_DIM_MULTIPLE = 16


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of one decoder layer by its short name, e.g. `mlp.up_proj.weight`."""
    if config.architecture.is_llama_family:
        return llama.layer_shapes(config)
    return transformers_layer.layer_shapes(config)


def make_decoder_layers(
    config: ModelConfig, kernels: CpuKernels | TorchKernels, max_num_tokens: int
) -> DecoderLayers[Any]:
    """What stores and makes the layers of `config`, for batches of up to `max_num_tokens`.

    Raises:
        ConfigError: the kernels cannot serve this architecture, or these dimensions.
    """
    if isinstance(kernels, TorchKernels):
        graphs = None
        if kernels.device.type == "cuda":
            graphs = DecodeGraphs(config, kernels, CudaCapture())
        if config.architecture.is_llama_family:
            return TorchLlamaLayers(config, kernels, graphs, max_num_tokens)
        return TorchTransformersLayers(config, kernels, graphs, max_num_tokens)
    _check_dimensions(config)
    if config.architecture.is_llama_family:
        return LlamaLayers(config, kernels, max_num_tokens)
    return CpuTransformersLayers(config, kernels)


def _check_dimensions(config: ModelConfig) -> None:
    """Refuse what the attention kernel does not do."""
    if config.head_dim % _HEAD_DIM_MULTIPLE or config.head_dim > MAX_HEAD_DIM:
        raise ConfigError(
            f"a head dimension of {config.head_dim} is not supported on the CPU; it must be a"
            f" multiple of {_HEAD_DIM_MULTIPLE} and at most {MAX_HEAD_DIM}"
        )
    heads_per_kv_head = config.num_heads // config.num_kv_heads
    if heads_per_kv_head > MAX_HEADS_PER_KV_HEAD:
        raise ConfigError(
            f"{heads_per_kv_head} query heads per KV head are not supported on the CPU; at most"
            f" {MAX_HEADS_PER_KV_HEAD} are"
        )
