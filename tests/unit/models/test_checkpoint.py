"""A checkpoint gives exactly the saved tensors by layer, and is refused before it can do harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.worker.model.checkpoint import Checkpoint, CheckpointError
from services.worker.model.layers.factory import layer_shapes
from shared.errors import ConfigError

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
NUM_LAYERS = 3


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


def save_whole(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def save_sharded(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def rewrite(path: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors of model.safetensors, or removes those given as None."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("save", [save_whole, save_sharded])
@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SMALL)),
        LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
        Qwen2ForCausalLM(Qwen2Config(**SMALL)),
        Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    ],
    ids=["llama", "llama-bias", "qwen2", "qwen3"],
)
def test_every_tensor_of_every_layer(model: PreTrainedModel, save, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(model, tmp_path))
    state = model.state_dict()
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        short_names = {n.removeprefix(prefix) for n in state if n.startswith(prefix)}
        assert short_names == layer_shapes(checkpoint.config).keys()
    for name, tensor in state.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


def test_a_tied_head_need_not_be_stored(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    checkpoint = Checkpoint.open(save_whole(model, tmp_path))
    embedding = model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), embedding)


def test_half_precision_is_widened_on_request(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    checkpoint = Checkpoint.open(save_whole(model, tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    stored = model.state_dict()[name]
    assert checkpoint.tensor(name).dtype is torch.bfloat16
    widened = checkpoint.tensor(name, torch.float32)
    assert widened.dtype is torch.float32
    assert torch.equal(widened, stored.float())


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    rewrite(save_whole(tiny_llama(), tmp_path), {name: None})
    with pytest.raises(CheckpointError, match=f"no tensor {name}"):
        Checkpoint.open(tmp_path)


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(save_whole(tiny_llama(), tmp_path), {name: torch.zeros(64, 95)})
    with pytest.raises(CheckpointError, match=name) as caught:
        Checkpoint.open(tmp_path)
    assert "[64, 95]" in str(caught.value)
    assert "[64, 96]" in str(caught.value)


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    name = "model.norm.weight"
    rewrite(save_whole(tiny_llama(), tmp_path), {name: torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="type I8"):
        Checkpoint.open(tmp_path)


def test_tensors_nobody_asked_for_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(save_whole(tiny_llama(), tmp_path), {name: torch.zeros(8, dtype=torch.int64)})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(KeyError):
        checkpoint.tensor(name)


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept_bytes: int) -> None:
    file = save_whole(tiny_llama(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=str(file)):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_sharded(tiny_llama(), tmp_path)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        Checkpoint.open(tmp_path)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    save_whole(tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = NUM_LAYERS + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{NUM_LAYERS}\."):
        Checkpoint.open(tmp_path)


def test_errors_are_configuration_errors(tmp_path: Path) -> None:
    assert issubclass(CheckpointError, ConfigError)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
