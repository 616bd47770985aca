"""A request's KV out of a worker's cache and into another's: whole blocks, layer after layer.

cache of layer l   [ b0 | b1 | b2 | b3 | ... ]      block table of the request here: 3, 0
part               [ l: b3 b0 | l+1: b3 b0 | ... ]  blocks in token order
cache over there   [ -- | b3 | b0 | ... ]           block table of the request there: 1, 2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.worker.links.base import Buffer
from services.worker.model.runner import ModelRunner

#: Bytes of a part, about: large for a frame, small for the caches and the allocator.
_PART_BYTES = 1024 * 1024


def layer_parts(start: int, end: int, layer_bytes: int) -> list[tuple[int, int]]:
    """Cut the layers `[start, end)`, of `layer_bytes` each, into what travels in one frame."""
    step = max(1, _PART_BYTES // layer_bytes)
    return [(first, min(first + step, end)) for first in range(start, end, step)]


@torch.inference_mode()
def gather_kv(
    runner: ModelRunner, block_table: Sequence[int], start: int, end: int
) -> torch.Tensor:  # [end - start, num_blocks, *kv_block_shape]
    """A copy of the blocks `block_table` of the layers `[start, end)`."""
    index = torch.tensor(block_table, dtype=torch.int64, device=runner.device)
    part = torch.empty(
        (end - start, len(block_table), *runner.kv_block_shape),
        dtype=runner.dtype,
        device=runner.device,
    )
    for position, layer in enumerate(range(start, end)):
        torch.index_select(runner.kv_cache(layer), 0, index, out=part[position])
    return part


@torch.inference_mode()
def scatter_kv(
    runner: ModelRunner, block_table: Sequence[int], start: int, end: int, buffer: Buffer
) -> None:
    """Write what `gather_kv` read into the blocks `block_table`, in the same order.

    Raises:
        ValueError: the buffer has another size.
    """
    index = torch.tensor(block_table, dtype=torch.int64, device=runner.device)
    part = received_tensor(runner, buffer).view(
        end - start, len(block_table), *runner.kv_block_shape
    )
    for position, layer in enumerate(range(start, end)):
        # As a matrix: with the rows' own dimensions it takes twice as long.
        runner.kv_cache(layer).flatten(1).index_copy_(0, index, part[position].flatten(1))


def received_tensor(runner: ModelRunner, buffer: Buffer) -> torch.Tensor:  # [num_elements]
    """A received buffer as a tensor where the runner computes; on the CPU no copy is made.

    Raises:
        ValueError: it is empty, or not of whole elements.
    """
    return torch.frombuffer(buffer, dtype=runner.dtype).to(runner.device)


def as_buffer(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, which the view keeps alive; a GPU's is copied to the host."""
    return tensor.cpu().view(torch.uint8).numpy().data.cast("B")
