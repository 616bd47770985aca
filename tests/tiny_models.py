"""Small random models of every served architecture, as Hugging Face directories.

Weights are large enough that logits differ clearly, and norms and biases are random too, so that a
forgotten one is noticed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)

NUM_LAYERS = 4
VOCAB_SIZE = 199
MAX_MODEL_LEN = 256

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": VOCAB_SIZE - 1,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LLAMA_FAMILY: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "llama-tied-biased": LlamaConfig(
        **{**_SIZES, "num_key_value_heads": 4},
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=_LLAMA3_ROPE,
    ),
    "mistral-window": MistralConfig(**_SIZES, sliding_window=24, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "olmo2": Olmo2Config(**_SIZES),
    "phi3-window": Phi3Config(**_SIZES, sliding_window=24),
    "seed-oss": SeedOssConfig(**_SIZES, head_dim=32, attention_bias=True),
    "smollm3": SmolLM3Config(**_SIZES, no_rope_layer_interval=2, tie_word_embeddings=True),
}
ALL = {**LLAMA_FAMILY, **OTHERS}


def _randomised(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            if name.endswith("embed_tokens.weight"):
                parameter *= 3.0
    return model


class TinyModels:
    """Model directories below `root`, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, name: str) -> Path:
        """The directory of model `name`, a key of `ALL`."""
        path = self._root / name
        if not path.exists():
            _randomised(ALL[name]).save_pretrained(path)
        return path

    def reference(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The same model as transformers runs it."""
        return load_reference(self.directory(name), dtype)


@cache
def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a directory as transformers runs it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval()
