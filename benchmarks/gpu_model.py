"""Models of true shape with random weights, for `benchmarks.gpu`: nothing has to be downloaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.checkpoint import tensor_shapes
from services.worker.model.config import ModelConfig
from services.worker.model.loading import RunnerConfig
from services.worker.model.runner import ModelRunner

_QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        **_QWEN25,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen2.5-14b": {
        **_QWEN25,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "tiny": {
        **_QWEN25,
        "vocab_size": 512,
        "eos_token_id": 1,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


class RandomWeights:
    """Implements `WeightSource`: every tensor is the beginning of one tensor of small noise."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self._shapes = dict(tensor_shapes(config))
        largest = max(map(math.prod, self._shapes.values()))
        self._noise = torch.empty(largest, dtype=dtype, device=device).normal_(std=0.02)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor with this full name."""
        shape = self._shapes[name]
        return self._noise[: math.prod(shape)].view(shape)

    def release(self) -> None:
        """Nothing: the noise is needed until the end."""


def model_config(shape: str) -> ModelConfig:
    """The configuration of `shape`, a key of `SHAPES`."""
    return ModelConfig.from_dict(SHAPES[shape], {}, where=shape)


def random_model(
    shape: str,
    kernels: TorchKernels,
    memory_bytes: int,
    chunk_bytes: int,
    max_num_batched_tokens: int,
) -> ModelRunner:
    """A loaded model of `shape`."""
    weights = RandomWeights(model_config(shape), kernels.dtype, kernels.device)
    config = RunnerConfig(Path(shape), memory_bytes, chunk_bytes, max_num_batched_tokens, None)
    return ModelRunner.load_from(weights, config, kernels)
