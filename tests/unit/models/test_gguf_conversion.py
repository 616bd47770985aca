"""A converted GGUF file is the model it was made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from services.worker.model.checkpoint import Checkpoint
from shared.models import ModelSourceError, resolve_model
from tests.unit.models.tiny_gguf import TinyGguf

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def ignore_progress(done_bytes: int, total_bytes: int) -> None:
    pass


def convert(tiny: TinyGguf, tmp_path: Path) -> Path:
    return resolve_model(
        str(tiny.write(tmp_path / "tiny.gguf")), tmp_path / "cache", ignore_progress
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "quantization",
    [Quant.F32, Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0],
)
def test_weights_are_exactly_the_dequantised_ones(
    tmp_path: Path, quantization: Quant, tied: bool
) -> None:
    tiny = TinyGguf(quantization=quantization, tied=tied)
    weights = load_file(convert(tiny, tmp_path) / "model.safetensors")
    expected = tiny.expected_weights()
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], values, err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_original_model(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    tiny = TinyGguf(architecture=architecture, tied=tied)
    directory = convert(tiny, tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(24).reshape(1, -1) * 9 % 200
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, tiny.model()(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_result_opens_as_a_checkpoint(tmp_path: Path, architecture: str) -> None:
    config = Checkpoint.open(convert(TinyGguf(architecture=architecture), tmp_path)).config
    assert config.eos_token_ids == (2,)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)


def test_progress_rises_to_the_size_of_the_weights(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = TinyGguf().write(tmp_path / "tiny.gguf")
    directory = resolve_model(str(path), tmp_path / "cache", lambda *call: calls.append(call))
    weights = load_file(directory / "model.safetensors")
    total_bytes = sum(values.nbytes for values in weights.values())
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == (total_bytes, total_bytes)


def test_a_second_call_uses_the_cache(tmp_path: Path) -> None:
    directory = convert(TinyGguf(), tmp_path)
    calls: list[tuple[int, int]] = []
    again = resolve_model(
        str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda *call: calls.append(call)
    )
    assert again == directory
    assert calls == []


def test_another_file_of_the_same_name_is_converted_anew(tmp_path: Path) -> None:
    first = convert(TinyGguf(tied=True), tmp_path)
    second = convert(TinyGguf(tied=False), tmp_path)
    assert first != second
    assert "lm_head.weight" in load_file(second / "model.safetensors")


def rotary_divisors() -> np.ndarray:
    """How llama.cpp stores Llama 3.1's scaling: plain frequency over scaled frequency."""
    plain = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=500000.0)
    scaled = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3_ROPE)
    ratio = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(scaled).inv_freq
    return ratio.numpy().astype(np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    tiny = TinyGguf(
        config={"rope_parameters": LLAMA3_ROPE}, tensors={"rope_freqs.weight": rotary_divisors()}
    )
    config = json.loads((convert(tiny, tmp_path) / "config.json").read_text())
    assert config["rope_parameters"] == LLAMA3_ROPE


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = rotary_divisors()
    factors[3] *= 1.5
    with pytest.raises(ModelSourceError, match=r"rope_freqs\.weight"):
        convert(
            TinyGguf(
                config={"rope_parameters": LLAMA3_ROPE}, tensors={"rope_freqs.weight": factors}
            ),
            tmp_path,
        )
