"""The fused decoder layer against transformers' own, and the same bits for any chunking."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_helpers import Pages, batch_of, geometry, pack
from torch import nn
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from services.worker.kernels.cpu import CpuKernels
from services.worker.kernels.library import LlamaLayerWeights
from tests import oracles

Span = tuple[int, int, int]
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 96, 160, 6, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "attn_implementation": "sdpa",
}
FAMILY = {
    "llama": (LlamaDecoderLayer, LlamaConfig(**SIZES, head_dim=16)),
    "llama with biases": (
        LlamaDecoderLayer,
        LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True),
    ),
    "mistral": (MistralDecoderLayer, MistralConfig(**SIZES, head_dim=32, sliding_window=20)),
    "qwen2": (Qwen2DecoderLayer, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3DecoderLayer, Qwen3Config(**SIZES, head_dim=32)),
}


@dataclass
class Layer:
    """A transformers layer with random weights, and the same weights packed."""

    kernels: CpuKernels
    module: nn.Module
    config: PretrainedConfig

    def __post_init__(self) -> None:
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=0.2)
        head_dim = self.module.self_attn.head_dim
        rope = LlamaRotaryEmbedding(LlamaConfig(**SIZES, head_dim=head_dim))
        cos, sin = rope(torch.empty(1, 1, dtype=torch.float32), torch.arange(200)[None])
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.sliding_window = getattr(self.module.self_attn, "sliding_window", None) or 0
        self.geometry = geometry(
            HEADS,
            KV_HEADS,
            head_dim,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            rms_norm_eps=self.config.rms_norm_eps,
            sliding_window=self.sliding_window,
        )
        self.weights = self._pack()

    def _pack(self) -> LlamaLayerWeights:
        attention, mlp = self.module.self_attn, self.module.mlp
        fused = {
            "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "o": [attention.o_proj],
            "gate_up": [mlp.gate_proj, mlp.up_proj],
            "down": [mlp.down_proj],
        }
        tensors = {
            "input_norm": self.module.input_layernorm.weight.detach(),
            "post_attention_norm": self.module.post_attention_layernorm.weight.detach(),
        }
        for name, parts in fused.items():
            weight = torch.cat([part.weight.detach() for part in parts])
            tensors[f"{name}_proj"] = pack(self.kernels, weight)
            if parts[0].bias is not None:
                tensors[f"{name}_bias"] = torch.cat([part.bias.detach() for part in parts])
        if hasattr(attention, "q_norm"):
            tensors["q_norm"] = attention.q_norm.weight.detach()
            tensors["k_norm"] = attention.k_norm.weight.detach()
        self._keep_alive = tensors
        return LlamaLayerWeights(**{name: t.data_ptr() for name, t in tensors.items()})

    def pages(self, lengths: list[int]) -> Pages:
        return Pages.empty(lengths, KV_HEADS, self.geometry.head_dim)

    def run(
        self, kernels: CpuKernels, pages: Pages, hidden: torch.Tensor, spans: list[Span]
    ) -> torch.Tensor:
        out = hidden.clone()
        batch = batch_of(pages, spans, self.cos, self.sin)
        nbytes = kernels.llama_layer_workspace_nbytes(self.geometry, len(hidden))
        workspace = torch.full((nbytes // 4,), torch.nan)
        address = pages.kv.data_ptr()
        kernels.llama_layer(out, address, self.geometry, self.weights, batch, workspace)
        return out

    def oracle(self, hidden: torch.Tensor) -> torch.Tensor:
        """transformers' layer on one whole sequence, in double precision."""
        length = len(hidden)
        position_embeddings = (self.cos[None, :length].double(), self.sin[None, :length].double())
        with torch.no_grad():
            out = self.module.double()(
                hidden[None].double(),
                attention_mask=oracles.visible(length, length, self.sliding_window)[None, None],
                position_embeddings=position_embeddings,
                position_ids=torch.arange(length)[None],
            )
        return out[0]


@pytest.fixture(params=FAMILY)
def layer(request: pytest.FixtureRequest, kernels: CpuKernels) -> Layer:
    make, config = FAMILY[request.param]
    return Layer(kernels, make(config, layer_idx=0).eval(), config)


def test_equals_the_transformers_layer(layer: Layer, kernels: CpuKernels) -> None:
    hidden = torch.randn(50, HIDDEN)
    got = layer.run(kernels, layer.pages([50]), hidden, [(0, 0, 50)])
    want = layer.oracle(hidden)
    scale = want.abs().max()
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=1e-5, atol=1e-6)


def test_chunks_and_batches_give_the_same_bits(
    layer: Layer, kernels: CpuKernels, single: CpuKernels
) -> None:
    first, second = torch.randn(45, HIDDEN), torch.randn(70, HIDDEN)
    want = layer.run(single, layer.pages([45]), first, [(0, 0, 45)])
    for chunk in (1, 16, 19):
        pages = layer.pages([45, 70])
        for begin in range(0, 45, chunk):
            end = min(begin + chunk, 45)
            other = min(begin + 1, 69)
            hidden = torch.cat([first[begin:end], second[other : other + 1]])
            layer.run(kernels, pages, second[: other + 1], [(1, 0, other + 1)])
            got = layer.run(kernels, pages, hidden, [(0, begin, end), (1, other, other + 1)])
            assert torch.equal(got[:-1], want[begin:end])


def test_a_workspace_that_is_too_small_is_refused(kernels: CpuKernels) -> None:
    make, config = FAMILY["llama"]
    layer = Layer(kernels, make(config, layer_idx=0), config)
    pages = layer.pages([3])
    batch = batch_of(pages, [(0, 0, 3)], layer.cos, layer.sin)
    with pytest.raises(ValueError, match="workspace"):
        kernels.llama_layer(
            torch.zeros(3, HIDDEN),
            pages.kv.data_ptr(),
            layer.geometry,
            layer.weights,
            batch,
            torch.zeros(8),
        )
