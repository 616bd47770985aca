"""Writes small GGUF files from random Hugging Face models, the way llama.cpp's converter does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "1 2", "a b")
TOKENS = (
    *SPECIAL_TOKENS,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
)
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"

_CONTROL, _NORMAL = 3, 1
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@dataclass(frozen=True)
class TinyGguf:
    """What to write; `fields` and `tensors` are added to, or replace, what a model needs."""

    architecture: str = "llama"
    quantization: Quant = Quant.F32
    tied: bool = True
    pre: str = "smollm"
    add_bos: bool | None = None
    name: str | None = None
    fields: dict[str, str | int | float] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    tokens: tuple[str, ...] = TOKENS
    merges: tuple[str, ...] = MERGES
    config: dict[str, object] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        """The random model the file is made of; always the same one."""
        config_class, model_class = _CLASSES[self.architecture]
        config = config_class(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=self.tied,
            **self.config,
        )
        torch.manual_seed(7)
        model = model_class(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    def write(self, path: Path) -> Path:
        model = self.model()
        writer = gguf.GGUFWriter(path, self.name or self.architecture)
        self._add_fields(writer, model.config)
        self._add_vocabulary(writer)
        for name, values in model.state_dict().items():
            if name == "lm_head.weight" and self.tied:
                continue
            self._add_tensor(writer, name, values.numpy(), model.config)
        for name, array in self.tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _add_fields(self, writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        for key, value in self.fields.items():
            match value:
                case str():
                    writer.add_string(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)

    def _add_vocabulary(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(
            [_CONTROL if token in SPECIAL_TOKENS else _NORMAL for token in self.tokens]
        )
        writer.add_token_merges(list(self.merges))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template(CHAT_TEMPLATE)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)

    def _add_tensor(
        self,
        writer: gguf.GGUFWriter,
        hf_name: str,
        values: NDArray[np.float32],
        config: PretrainedConfig,
    ) -> None:
        name = _gguf_name(hf_name)
        if name in self.without:
            return
        if self.architecture == "llama" and ".attn_q." in name:
            values = _interleave(values, config.num_attention_heads)
        if self.architecture == "llama" and ".attn_k." in name:
            values = _interleave(values, config.num_key_value_heads)
        kind = self.quantization if values.ndim == 2 else Quant.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def expected_weights(self) -> dict[str, NDArray[np.float32]]:
        """Each Hugging Face tensor after one trip through the quantisation, in its own order."""
        expected: dict[str, NDArray[np.float32]] = {}
        for name, values in self.model().state_dict().items():
            if name == "lm_head.weight" and self.tied:
                continue
            kind = self.quantization if values.ndim == 2 else Quant.F32
            stored = gguf.quants.quantize(values.numpy(), kind)
            expected[name] = gguf.quants.dequantize(stored, kind)
        return expected


def _gguf_name(hf_name: str) -> str:
    stem, _, kind = hf_name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{_TENSORS[stem]}.{kind}"
    _, _, layer, short = stem.split(".", 3)
    return f"blk.{layer}.{_TENSORS[short]}.{kind}"


def _interleave(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Row 2i of a head becomes its row i, row 2i + 1 its row i + half, as llama.cpp stores it."""
    stored = np.empty_like(values)
    head_dim = len(values) // num_heads
    half = head_dim // 2
    for head in range(num_heads):
        for i in range(half):
            stored[head * head_dim + 2 * i] = values[head * head_dim + i]
            stored[head * head_dim + 2 * i + 1] = values[head * head_dim + half + i]
    return stored
