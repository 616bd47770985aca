"""KV and hidden states travel as bytes between workers, whatever their type."""

from __future__ import annotations

import pytest
import torch

from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.pipeline.kv_transfer import (
    as_buffer,
    gather_kv,
    received_tensor,
    scatter_kv,
)
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.torch_ops import TorchOps
from tests.unit.model.model_helpers import PagedSequence, last_logits, open_runner, random_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROMPT = random_tokens(40, seed=4, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_arrive_in_another_table_as_they_were(
    dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    kernels = TorchKernels(torch.device("cpu"), dtype, TorchOps())
    directory = tiny_models.directory("llama")
    with open_runner(directory, kernels) as source, open_runner(directory, kernels) as destination:
        last_logits(source, [PagedSequence(PROMPT, [4, 0, 7]).take(len(PROMPT))])
        part = gather_kv(source, [4, 0, 7], 1, 3)
        scatter_kv(destination, [2, 6, 1], 1, 3, bytearray(as_buffer(part)))
        for layer in (1, 2):
            arrived = destination.kv_cache(layer)[[2, 6, 1]]
            assert arrived.dtype is dtype
            assert torch.equal(arrived, source.kv_cache(layer)[[4, 0, 7]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_keep_their_type_and_bits(
    dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    kernels = TorchKernels(torch.device("cpu"), dtype, TorchOps())
    with open_runner(tiny_models.directory("llama"), kernels) as runner:
        hidden = runner.embed(runner.make_batch([PagedSequence(PROMPT, [0, 1, 2]).take(40)]))
        received = received_tensor(runner, bytearray(as_buffer(hidden)))
        assert received.dtype is dtype
        assert torch.equal(received.view(hidden.shape), hidden)
