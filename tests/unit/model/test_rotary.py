"""cos and sin are transformers' own for every served kind, and do not depend on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from services.worker.model.config import ModelConfig
from services.worker.model.rotary import RotaryTable
from shared.errors import ConfigError

NUM_POSITIONS = 5000
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
}


def llama_config(rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=8192,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
    )


def parse(config: LlamaConfig) -> ModelConfig:
    return ModelConfig.from_dict(config.to_dict(), {}, where="config.json")


@pytest.mark.parametrize("rope", KINDS.values(), ids=KINDS.keys())
def test_rows_are_those_of_transformers(rope: dict[str, Any]) -> None:
    config = llama_config(rope)
    positions = torch.arange(NUM_POSITIONS)
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    actual = RotaryTable(parse(config)).rows(positions, NUM_POSITIONS)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0], atol=2e-7, rtol=0.0)


def test_rows_do_not_depend_on_what_was_asked_before() -> None:
    config = parse(llama_config(KINDS["llama3"]))
    positions = torch.tensor([4999, 3, 4999, 2048])
    at_once = RotaryTable(config).rows(positions, NUM_POSITIONS)
    grown = RotaryTable(config)
    grown.rows(torch.tensor([0]), 1)
    for row, position in enumerate(positions.tolist()):
        cos, sin = grown.rows(torch.tensor([position]), position + 1)
        assert torch.equal(cos[0], at_once[0][row])
        assert torch.equal(sin[0], at_once[1][row])


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "no such kind"])
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    config = parse(llama_config(KINDS["default"]))
    with pytest.raises(ConfigError, match=f"rope type '{kind}' of LlamaForCausalLM"):
        RotaryTable(replace(config, rope_scaling={"rope_type": kind, "rope_theta": 1e4}))
