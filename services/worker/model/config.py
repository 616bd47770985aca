"""The dimensions of a model, read from its config.json without transformers.

Called by the worker before anything is loaded: memory is planned, the checkpoint is checked and
layers are built from these numbers. Field names are vLLM's where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from services.worker.model.config_fields import Fields
from services.worker.model.transformers_config import transformers_config
from shared.errors import ConfigError
from shared.models.source import read_json_object


class Architecture(StrEnum):
    """The decoder architectures that are served, by their name in `architectures`."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    OLMO2 = "Olmo2ForCausalLM"
    PHI3 = "Phi3ForCausalLM"
    SEED_OSS = "SeedOssForCausalLM"
    SMOLLM3 = "SmolLM3ForCausalLM"

    @property
    def is_llama_family(self) -> bool:
        """True for those that one fused layer serves; Hugging Face's own layer serves the rest."""
        return self in (self.LLAMA, self.MISTRAL, self.QWEN2, self.QWEN3)


class LayerType(StrEnum):
    """What a layer attends to: everything before a token, or its last `sliding_window` tokens."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_ROPE_TYPE = "default"
_MISTRAL_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_WINDOW = 4096
_QWEN_DEFAULT_MAX_WINDOW_LAYERS = 28
_QWEN3_DEFAULT_HEAD_DIM = 128


@dataclass(frozen=True)
class ModelConfig:
    """What the worker needs to know of a model. Build it with `from_directory` or `from_dict`.

    `rope_scaling` is the dict that modifies the plain rotary embedding (with `rope_type`), None
    when nothing does. `eos_token_ids` come from generation_config.json and config.json together.
    `qkv_bias` to `qk_norm` describe the layers of the Llama family; of other architectures only
    transformers knows such details. `raw` is the whole config.json, for transformers to read; of
    other architectures it also has transformers' defaults.
    """

    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    layer_types: tuple[LayerType, ...]
    eos_token_ids: tuple[int, ...]
    hidden_act: str
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Reads config.json and, if present, generation_config.json. Raises `ConfigError`."""
        generation = path / "generation_config.json"
        return cls.from_dict(
            read_json_object(path / "config.json"),
            read_json_object(generation) if generation.exists() else {},
            where=str(path / "config.json"),
        )

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], *, where: str
    ) -> ModelConfig:
        """Checks every field; a `ConfigError` names `where` and the field that cannot work."""
        fields = Fields(raw, where)
        architecture = _architecture(fields)
        if not architecture.is_llama_family:
            raw = transformers_config(raw, where).to_dict()
            fields = Fields(raw, where)
        _refuse_variants(fields)
        num_heads = fields.count("num_attention_heads")
        num_layers = fields.count("num_hidden_layers")
        hidden_size = fields.count("hidden_size")
        vocab_size = fields.count("vocab_size")
        sliding_window, layer_types = _attention_window(fields, architecture, num_layers)
        rope_theta, rope_scaling = _rope(fields)
        attention_bias = _attention_bias(fields, architecture)
        is_llama = architecture is Architecture.LLAMA
        config = cls(
            architecture=architecture,
            num_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads),
            head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
            vocab_size=vocab_size,
            max_model_len=fields.count("max_position_embeddings"),
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=attention_bias or architecture is Architecture.QWEN2,
            o_bias=attention_bias,
            mlp_bias=is_llama and fields.flag("mlp_bias"),
            qk_norm=architecture is Architecture.QWEN3,
            sliding_window=sliding_window,
            layer_types=layer_types,
            eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
            hidden_act=fields.activation(),
            raw=raw,
        )
        if config.num_heads % config.num_kv_heads:
            raise fields.error(
                "num_key_value_heads", f"must divide num_attention_heads ({num_heads})"
            )
        return config

    @property
    def rope_type(self) -> str:
        """The name of the rotary embedding, as in transformers' `ROPE_INIT_FUNCTIONS`."""
        if self.rope_scaling is None:
            return _DEFAULT_ROPE_TYPE
        return str(self.rope_scaling["rope_type"])

    def window_of_layer(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of this layer attends to; None for all."""
        return self.sliding_window if self.layer_types[layer] is LayerType.SLIDING else None


def _architecture(fields: Fields) -> Architecture:
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise fields.error("architectures", "must be a list of one name")
    if names[0] not in list(Architecture):
        supported = ", ".join(Architecture)
        raise fields.error("architectures", f"is not supported; supported are {supported}")
    return Architecture(names[0])


def _refuse_variants(fields: Fields) -> None:
    """Fields that change the mathematics of the architectures in ways nobody serves here."""
    if fields.raw.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config", "is not supported; use weights in fp32, fp16 or bf16"
        )
    if fields.positive("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "is not supported; only 1 is")


def _head_dim(fields: Fields, architecture: Architecture, hidden_size: int, num_heads: int) -> int:
    implied = _QWEN3_DEFAULT_HEAD_DIM
    if architecture is not Architecture.QWEN3:
        implied = hidden_size // num_heads
        if fields.raw.get("head_dim") is None and hidden_size % num_heads:
            raise fields.error("hidden_size", f"must be a multiple of {num_heads} heads")
    head_dim = fields.count("head_dim", implied)
    if head_dim % 2:
        raise fields.error("head_dim", "must be even, because rotary embedding turns pairs")
    return head_dim


def _attention_bias(fields: Fields, architecture: Architecture) -> bool:
    """Llama and Qwen3 say it in the config; Qwen2 has a fixed set of biases and Mistral none."""
    if architecture in (Architecture.LLAMA, Architecture.QWEN3):
        return fields.flag("attention_bias")
    return False


def _attention_window(
    fields: Fields, architecture: Architecture, num_layers: int
) -> tuple[int | None, tuple[LayerType, ...]]:
    """The window and which layers have it, with the defaults of each architecture's own config."""
    all_full = (LayerType.FULL,) * num_layers
    if architecture in (Architecture.MISTRAL, Architecture.PHI3):
        if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
            return None, all_full
        window = fields.count("sliding_window", _MISTRAL_DEFAULT_WINDOW)
        return window, (LayerType.SLIDING,) * num_layers
    if architecture is Architecture.LLAMA or not fields.flag("use_sliding_window"):
        return None, all_full  # Olmo2 and SeedOss have no such field
    window = fields.count("sliding_window", _QWEN_DEFAULT_WINDOW)
    return window, _layer_types(fields, num_layers)


def _layer_types(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    names = fields.raw.get("layer_types")
    if names is None:
        full_layers = fields.raw.get("max_window_layers", _QWEN_DEFAULT_MAX_WINDOW_LAYERS)
        if not isinstance(full_layers, int) or full_layers < 0:
            raise fields.error("max_window_layers", "must be a whole number")
        return tuple(
            LayerType.SLIDING if layer >= full_layers else LayerType.FULL
            for layer in range(num_layers)
        )
    if not isinstance(names, list) or len(names) != num_layers:
        raise fields.error("layer_types", f"must list one type for each of {num_layers} layers")
    if not all(name in list(LayerType) for name in names):
        raise fields.error("layer_types", f"may only hold {', '.join(LayerType)}")
    return tuple(LayerType(name) for name in names)


def _rope(fields: Fields) -> tuple[float, Mapping[str, Any] | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or the older pair of fields."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    parameters = fields.raw.get(name)
    if parameters is None:
        return fields.positive("rope_theta", _DEFAULT_ROPE_THETA), None
    if not isinstance(parameters, dict) or LayerType.FULL in parameters:
        raise fields.error(name, "must be one set of parameters for all layers")
    nested = Fields(parameters, f"{fields.where}: {name}")
    theta = nested.positive("rope_theta", fields.positive("rope_theta", _DEFAULT_ROPE_THETA))
    rope_type = parameters.get("rope_type", parameters.get("type", _DEFAULT_ROPE_TYPE))
    if not isinstance(rope_type, str):
        raise nested.error("rope_type", "must be a name")
    if nested.positive("partial_rotary_factor", 1.0) != 1.0:
        raise nested.error("partial_rotary_factor", "is not supported; only 1 is")
    if rope_type == _DEFAULT_ROPE_TYPE:
        return theta, None
    return theta, {**parameters, "rope_type": rope_type}


def _eos_token_ids(
    fields: Fields, generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    ids: dict[int, None] = {}  # a dict keeps the order and drops repetitions
    for source in (generation, fields.raw):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
            if not is_id or not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"{fields.where}: eos_token_id {token_id!r} is not an id below {vocab_size}"
                )
            ids[token_id] = None
    return tuple(ids)
