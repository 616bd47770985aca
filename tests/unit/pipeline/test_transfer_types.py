"""KV and hidden states travel as bytes between workers, whatever their type."""

from __future__ import annotations

import pytest
import torch

from services.worker.channels.host import HostChannel
from services.worker.kernels.torch_kernels import TorchKernels
from services.worker.links.base import LinkClass
from services.worker.pipeline.kv_transfer import gather_kv, scatter_kv
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
        part = torch.empty(2 * 3 * source.kv_block_bytes, dtype=torch.uint8)
        gather_kv(source, [4, 0, 7], 1, 3, part)
        scatter_kv(destination, [2, 6, 1], 1, 3, part)
        for layer in (1, 2):
            arrived = destination.kv_cache(layer)[[2, 6, 1]]
            assert arrived.dtype is dtype
            assert torch.equal(arrived, source.kv_cache(layer)[[4, 0, 7]])


def test_a_part_of_another_size_is_refused(tiny_models: TinyModels) -> None:
    kernels = TorchKernels(torch.device("cpu"), torch.float32, TorchOps())
    with open_runner(tiny_models.directory("llama"), kernels) as runner:
        part = torch.empty(3 * runner.kv_block_bytes, dtype=torch.uint8)
        with pytest.raises(ValueError, match="not 2 blocks"):
            scatter_kv(runner, [0, 1], 0, 1, part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_keep_their_type_and_bits(
    dtype: torch.dtype, tiny_models: TinyModels
) -> None:
    kernels = TorchKernels(torch.device("cpu"), dtype, TorchOps())
    channel = HostChannel(torch.device("cpu"))
    with open_runner(tiny_models.directory("llama"), kernels) as runner:
        hidden = runner.embed(runner.make_batch([PagedSequence(PROMPT, [0, 1, 2]).take(40)]))
        (buffer,) = channel.pack(hidden, LinkClass.CONTROL)
        with channel.received([bytearray(buffer)]) as received:
            assert torch.equal(received.view(dtype).view(hidden.shape), hidden)
