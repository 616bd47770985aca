"""Which layers serve a model, what is refused by name, and that transformers loads only if used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.model.checkpoint import Checkpoint, CheckpointError
from services.worker.model.config import LayerType, ModelConfig
from services.worker.model.layers.cpu_transformers import CpuTransformersLayers
from services.worker.model.layers.factory import layer_shapes, make_decoder_layers
from services.worker.model.layers.llama import LlamaLayers
from services.worker.model.layers.torch_llama import TorchLlamaLayers
from services.worker.model.layers.torch_transformers import TorchTransformersLayers
from shared.errors import ConfigError
from tests.tiny_models import ALL, LLAMA_FAMILY, NUM_LAYERS, TinyModels
from tests.torch_ops import TorchOps

MAX_NUM_TOKENS = 64


@pytest.mark.parametrize("name", ALL)
def test_the_llama_family_is_fused_and_the_rest_is_transformers(
    name: str, tiny_models: TinyModels, kernels: CpuKernels
) -> None:
    config = ModelConfig.from_directory(tiny_models.directory(name))
    on_cpu = make_decoder_layers(config, kernels, MAX_NUM_TOKENS)
    assert isinstance(on_cpu, LlamaLayers if name in LLAMA_FAMILY else CpuTransformersLayers)
    torch_kernels = TorchKernels(torch.device("cpu"), torch.float32, TorchOps())
    on_cuda = make_decoder_layers(config, torch_kernels, MAX_NUM_TOKENS)
    expected = TorchLlamaLayers if name in LLAMA_FAMILY else TorchTransformersLayers
    assert isinstance(on_cuda, expected)


@pytest.mark.parametrize("name", LLAMA_FAMILY)
def test_shapes_of_the_fused_layer_are_those_of_transformers(
    name: str, tiny_models: TinyModels
) -> None:
    config = ModelConfig.from_directory(tiny_models.directory(name))
    module = tiny_models.reference(name).model.layers[0]
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert layer_shapes(config) == expected


def edited(directory: Path, target: Path, **fields: Any) -> Path:
    """A copy of config.json with other fields."""
    raw = json.loads((directory / "config.json").read_text())
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({**raw, **fields}))
    return target


@pytest.mark.parametrize(
    "architecture", ["GemmaForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM", "T5Model"]
)
def test_other_architectures_are_refused_by_name(
    architecture: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = edited(tiny_models.directory("llama"), tmp_path, architectures=[architecture])
    with pytest.raises(ConfigError, match=f"{architecture}.* is not supported; supported are"):
        ModelConfig.from_directory(path)


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("phi3-window", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("smollm3", {"no_rope_layers": "none"}, "transformers refuses this configuration"),
        ("smollm3", {"model_type": "no such type"}, "transformers refuses this configuration"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("seed-oss", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_configurations_that_cannot_work_are_refused(
    name: str, fields: dict[str, Any], problem: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = edited(tiny_models.directory(name), tmp_path, **fields)
    with pytest.raises(ConfigError, match=problem):
        ModelConfig.from_directory(path)


@pytest.mark.parametrize(
    ("name", "dimensions", "problem"),
    [
        ("llama", {"head_dim": 24}, "head dimension of 24"),
        ("llama", {"head_dim": 512}, "head dimension of 512"),
        ("llama", {"num_heads": 258}, "129 query heads per KV head"),
        ("olmo2", {"intermediate_size": 100}, "intermediate_size of 100"),
    ],
)
def test_dimensions_the_kernels_do_not_do_are_refused(
    name: str,
    dimensions: dict[str, int],
    problem: str,
    tiny_models: TinyModels,
    kernels: CpuKernels,
) -> None:
    config = ModelConfig.from_directory(tiny_models.directory(name))
    with pytest.raises(ConfigError, match=problem):
        make_decoder_layers(replace(config, **dimensions), kernels, MAX_NUM_TOKENS)


def test_windows_of_other_architectures_are_known(tiny_models: TinyModels) -> None:
    phi = ModelConfig.from_directory(tiny_models.directory("phi3-window"))
    assert phi.sliding_window == 24
    assert phi.layer_types == (LayerType.SLIDING,) * NUM_LAYERS
    assert ModelConfig.from_directory(tiny_models.directory("olmo2")).sliding_window is None


def test_a_checkpoint_of_another_architecture_is_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    path = edited(tiny_models.directory("olmo2"), tmp_path)
    weights = tiny_models.directory("llama") / "model.safetensors"
    (path / "model.safetensors").symlink_to(weights)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.0\."):
        Checkpoint.open(path)


LOAD = """
import sys
from pathlib import Path
from services.worker.kernels.cpu import CpuKernels
from services.worker.model.loading import RunnerConfig
from services.worker.model.runner import ModelRunner

ModelRunner.load(RunnerConfig(Path(sys.argv[1]), 2**22, 2**14, 64, None), CpuKernels(1))
sys.exit(3 if "transformers" in sys.modules else 0)
"""


@pytest.mark.parametrize(("name", "expected"), [("llama", 0), ("qwen3", 0), ("olmo2", 3)])
def test_transformers_is_imported_only_where_it_is_used(
    name: str, expected: int, tiny_models: TinyModels
) -> None:
    directory = str(tiny_models.directory(name))
    done = subprocess.run([sys.executable, "-c", LOAD, directory], timeout=60, check=False)
    assert done.returncode == expected
