"""Which GGUF architectures are converted, and how their fields and tensors are named elsewhere.

Pure: from an open `GgufFile` to the Hugging Face `config.json` and the list of tensors to write.
The rows of q and k of architecture `llama` are stored in another order, because llama.cpp rotates
neighbouring pairs where Hugging Face rotates halves:

    GGUF  rows of a head:  0  h  1  h+1  2  h+2 ...        h = head_dim / 2
    HF    rows of a head:  0  1  2  ...  h  h+1  h+2 ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.models.errors import ModelSourceError
from shared.models.gguf_file import GgufFile
from shared.models.gguf_header import GgufTensor

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


@dataclass(frozen=True)
class Architecture:
    """One supported value of `general.architecture`."""

    name: str
    hf_class: str
    interleaves_rotary_rows: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", "LlamaForCausalLM", interleaves_rotary_rows=True),
        Architecture("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Architecture("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    )
}


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of the result: its names, its shape, and the heads whose rows to reorder."""

    gguf_name: str
    hf_name: str
    shape: tuple[int, ...]
    interleaved_heads: int | None = None

    def row_order(self) -> NDArray[np.intp] | None:
        """Index of the stored row for each wanted row; None when the order is the same."""
        if self.interleaved_heads is None:
            return None
        rows = np.arange(self.shape[0]).reshape(self.interleaved_heads, -1, 2)
        return rows.swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class GgufModel:
    """The dimensions of the model in a GGUF file, read and checked. Raises `ModelSourceError`."""

    file: GgufFile
    architecture: Architecture
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def read(cls, file: GgufFile) -> GgufModel:
        name = file.required("general.architecture", str)
        architecture = ARCHITECTURES.get(name)
        if architecture is None:
            raise ModelSourceError(
                f"{file.path} has the unsupported architecture {name!r}; supported are"
                f" {', '.join(ARCHITECTURES)}"
            )
        hidden_size = _positive(file, f"{name}.embedding_length")
        num_heads = _positive(file, f"{name}.attention.head_count")
        model = cls(
            file=file,
            architecture=architecture,
            num_layers=_positive(file, f"{name}.block_count"),
            hidden_size=hidden_size,
            intermediate_size=_positive(file, f"{name}.feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=_positive(file, f"{name}.attention.head_count_kv", num_heads),
            head_dim=_positive(file, f"{name}.attention.key_length", hidden_size // num_heads),
            vocab_size=_tensor(file, "token_embd.weight").shape[0],
        )
        model._check()
        return model

    @property
    def tied_embeddings(self) -> bool:
        return "output.weight" not in self.file.tensors

    def hf_config(self) -> dict[str, object]:
        """The content of `config.json`."""
        name = self.architecture.name
        context_length = _positive(self.file, f"{name}.context_length")
        epsilon = self.file.required(f"{name}.attention.layer_norm_rms_epsilon", float)
        config: dict[str, object] = {
            "architectures": [self.architecture.hf_class],
            "model_type": name,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "float32",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": context_length,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": _shortest_float(epsilon),
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": self.tied_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        return config

    def tensor_mappings(self) -> list[TensorMapping]:
        """The tensors to write, layer by layer; every tensor of the file is accounted for."""
        mappings: list[TensorMapping] = []
        for mapping in self._mappings():
            mappings.append(mapping)
            found = _tensor(self.file, mapping.gguf_name).shape
            if found != mapping.shape:
                raise ModelSourceError(
                    f"{self.file.path}: tensor {mapping.gguf_name} has shape {found}, the metadata"
                    f" says {mapping.shape}; get the file again"
                )
        unknown = self.file.tensors.keys() - {m.gguf_name for m in mappings} - {_ROPE_FACTORS}
        if unknown:
            raise ModelSourceError(
                f"{self.file.path}: tensor {min(unknown)} does not belong to a plain"
                f" {self.architecture.name} model; this variant is not supported"
            )
        return mappings

    def _check(self) -> None:
        name, path = self.architecture.name, self.file.path
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ModelSourceError(
                f"{path} is corrupt: {self.num_heads} heads, {self.num_kv_heads} KV heads,"
                f" head size {self.head_dim}; get the file again"
            )
        rotary = self.file.optional(f"{name}.rope.dimension_count", int, self.head_dim)
        value_length = self.file.optional(f"{name}.attention.value_length", int, self.head_dim)
        if rotary != self.head_dim or value_length != self.head_dim:
            raise ModelSourceError(
                f"{path}: rotary size {rotary} and value size {value_length} differ from the head"
                f" size {self.head_dim}; such models are not supported"
            )

        num_tokens = len(self.file.required_list("tokenizer.ggml.tokens", str))
        if num_tokens > self.vocab_size:
            raise ModelSourceError(
                f"{path} is corrupt: {num_tokens} tokens but {self.vocab_size} rows in its"
                " embedding; get the file again"
            )

    def _mappings(self) -> Iterator[TensorMapping]:
        matrix = (self.vocab_size, self.hidden_size)
        yield TensorMapping("token_embd.weight", "model.embed_tokens.weight", matrix)
        for layer in range(self.num_layers):
            for source, target, shape, heads in self._layer_parts():
                yield TensorMapping(
                    f"blk.{layer}.{source}", f"model.layers.{layer}.{target}", shape, heads
                )
        yield TensorMapping("output_norm.weight", "model.norm.weight", (self.hidden_size,))
        if not self.tied_embeddings:
            yield TensorMapping("output.weight", "lm_head.weight", matrix)

    def _layer_parts(self) -> Iterator[tuple[str, str, tuple[int, ...], int | None]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        interleaved = self.architecture.interleaves_rotary_rows
        projections = {
            "q": (q, self.num_heads if interleaved else None),
            "k": (kv, self.num_kv_heads if interleaved else None),
            "v": (kv, None),
        }
        yield "attn_norm.weight", "input_layernorm.weight", (hidden,), None
        for part, (rows, heads) in projections.items():
            yield f"attn_{part}.weight", f"self_attn.{part}_proj.weight", (rows, hidden), heads
            if self.architecture.qkv_bias:
                yield f"attn_{part}.bias", f"self_attn.{part}_proj.bias", (rows,), None
        if self.architecture.qk_norm:
            for part in ("q", "k"):
                yield (
                    f"attn_{part}_norm.weight",
                    f"self_attn.{part}_norm.weight",
                    (self.head_dim,),
                    None,
                )
        yield "attn_output.weight", "self_attn.o_proj.weight", (hidden, q), None
        yield "ffn_norm.weight", "post_attention_layernorm.weight", (hidden,), None
        yield "ffn_gate.weight", "mlp.gate_proj.weight", (inner, hidden), None
        yield "ffn_up.weight", "mlp.up_proj.weight", (inner, hidden), None
        yield "ffn_down.weight", "mlp.down_proj.weight", (hidden, inner), None

    def _rope_parameters(self) -> dict[str, object]:
        name = self.architecture.name
        theta = self.file.optional(f"{name}.rope.freq_base", float, 10000.0)
        scaling = self.file.optional(f"{name}.rope.scaling.type", str, "none")
        if _ROPE_FACTORS in self.file.tensors:
            return {"rope_theta": theta, **self._llama3_scaling(theta)}
        if scaling == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        if scaling == "linear":
            factor = self.file.required(f"{name}.rope.scaling.factor", float)
            return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
        raise ModelSourceError(
            f"{self.file.path} scales its rotary embedding by {scaling!r}, which is not supported"
            " for GGUF; use the safetensors form of the model"
        )

    def _llama3_scaling(self, theta: float) -> dict[str, object]:
        """Llama 3.1's scaling, which GGUF keeps only as its result: one factor per frequency.

        The factor is the largest of them; the other three numbers are the same in every released
        model. They are taken only if they give exactly the factors that are in the file.
        """
        tensor = _tensor(self.file, _ROPE_FACTORS)
        raw = self.file.raw_rows(tensor)
        factors = raw.view(np.float32).ravel() if tensor.quantization.name == "F32" else None
        factor = 0.0 if factors is None else float(factors.max())
        expected = _llama3_factors(theta, self.head_dim, factor) if factor > 0 else None
        if factors is None or expected is None or factors.shape != expected.shape:
            matches = False
        else:
            matches = bool(np.allclose(factors, expected, rtol=1e-5, atol=0.0))
        if not matches:
            raise ModelSourceError(
                f"{self.file.path}: the rotary factors in {_ROPE_FACTORS} are not those of"
                " Llama 3.1; use the safetensors form of the model"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        }


def _llama3_factors(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    """Divisor of each rotary frequency, `[head_dim / 2]`: 1 for short waves, `factor` for long."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (_LLAMA3_ORIGINAL_CONTEXT / wavelengths - _LLAMA3_LOW_FREQ_FACTOR) / (
        _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors: NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.required(key, int) if default is None else file.optional(key, int, default)
    if value < 1:
        raise ModelSourceError(f"{file.path}: the GGUF field {key} is {value}; get the file again")
    return value


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelSourceError(f"{file.path} lacks the tensor {name}; get the file again")
    return tensor


def _shortest_float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
