"""config.json is read as transformers reads it, and what cannot work is refused by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from services.worker.model.config import Architecture, LayerType, ModelConfig
from shared.errors import ConfigError

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
BASE = {**SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def parse(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    return ModelConfig.from_dict(raw, generation or {}, where="config.json")


def saved(config: PretrainedConfig, architecture: Architecture, tmp_path: Path) -> ModelConfig:
    config.architectures = [architecture.value]
    config.save_pretrained(tmp_path)
    return ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), Architecture.LLAMA),
        (LlamaConfig(**SMALL, head_dim=32, tie_word_embeddings=True), Architecture.LLAMA),
        (MistralConfig(**SMALL, sliding_window=32), Architecture.MISTRAL),
        (MistralConfig(**SMALL, sliding_window=None), Architecture.MISTRAL),
        (Qwen2Config(**SMALL), Architecture.QWEN2),
        (
            Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=3),
            Architecture.QWEN2,
        ),
        (Qwen3Config(**SMALL, head_dim=16, attention_bias=True), Architecture.QWEN3),
    ],
    ids=lambda value: value.value if isinstance(value, Architecture) else "",
)
def test_configs_that_transformers_saves(
    config: PretrainedConfig, architecture: Architecture, tmp_path: Path
) -> None:
    parsed = saved(config, architecture, tmp_path)
    assert parsed.architecture is architecture
    assert parsed.num_layers == config.num_hidden_layers
    assert parsed.num_kv_heads == config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    assert parsed.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    assert parsed.rms_norm_eps == config.rms_norm_eps
    assert parsed.rope_theta == config.rope_parameters["rope_theta"]
    assert parsed.tie_word_embeddings == config.tie_word_embeddings
    assert parsed.sliding_window == getattr(config, "sliding_window", None)
    assert parsed.qk_norm is (architecture is Architecture.QWEN3)
    if architecture in (Architecture.QWEN2, Architecture.QWEN3):
        assert list(parsed.layer_types) == config.layer_types


def test_biases_of_each_architecture() -> None:
    llama = parse({**BASE, "attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse({**BASE, "architectures": ["Qwen2ForCausalLM"]})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    mistral = parse({**BASE, "architectures": ["MistralForCausalLM"]})
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)


def test_old_and_new_rope_fields_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0}
    old = parse({**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}})
    new = parse({**BASE, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}})
    for config in (old, new):
        assert config.rope_theta == 5e5
        assert config.rope_type == "llama3"
        assert config.rope_scaling is not None
        assert config.rope_scaling["factor"] == 8.0
    plain = parse({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert (plain.rope_theta, plain.rope_scaling, plain.rope_type) == (1e6, None, "default")


def test_windows_by_layer() -> None:
    mistral = parse({**BASE, "architectures": ["MistralForCausalLM"], "sliding_window": 32})
    assert [mistral.window_of_layer(layer) for layer in range(4)] == [32] * 4
    qwen = parse(
        {
            **BASE,
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": [LayerType.FULL, LayerType.SLIDING] * 2,
        }
    )
    assert [qwen.window_of_layer(layer) for layer in range(4)] == [None, 16, None, 16]
    assert parse(BASE).window_of_layer(0) is None


def test_eos_ids_of_both_files_are_joined() -> None:
    config = parse({**BASE, "eos_token_id": 2}, {"eos_token_id": [7, 2]})
    assert config.eos_token_ids == (7, 2)
    assert parse({**BASE, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"num_key_value_heads"}))
def test_missing_fields_are_named(name: str) -> None:
    raw = {key: value for key, value in BASE.items() if key != name}
    with pytest.raises(ConfigError, match=f"{name}, which is missing"):
        parse(raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", 65),
        ("num_hidden_layers", True),
        ("num_hidden_layers", -3),
        ("num_key_value_heads", 3),
        ("vocab_size", 1.5),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("head_dim", 15),
        ("rope_theta", -1),
        ("rope_scaling", "linear"),
        ("tie_word_embeddings", "yes"),
        ("hidden_act", "gelu"),
        ("eos_token_id", 100),
        ("eos_token_id", "</s>"),
        ("quantization_config", {"quant_method": "awq"}),
        ("partial_rotary_factor", 0.5),
        ("architectures", None),
        ("architectures", ["MixtralForCausalLM"]),
        ("architectures", [["LlamaForCausalLM"]]),
    ],
)
def test_absurd_fields_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        parse({**BASE, name: value})
    assert "config.json" in str(caught.value)
