"""Two processes on a real GPU, linked as workers are: KV and activations. None of it has run yet.

The channels' contract (`tests/contract/test_channels.py`) runs between two such processes, too.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_links import KINDS, linked
from benchmarks.gpu_links_measure import End
from benchmarks.gpu_links_peer import SHAPE
from services.worker.channels.base import ChannelKind

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_benchmark_measures_does_work(kind: ChannelKind) -> None:
    from services.worker.kernels.cuda.ops import TritonOps

    end = End(DEVICE, TritonOps(), SHAPE)
    with linked(end, kind, DEVICE) as link:
        assert end.exchange(link, 20).seconds > 0
        assert end.activation(link, num_tokens=32, repetitions=20).seconds > 0
        assert {each for each, _ in link.stats().tensors} == {kind}
