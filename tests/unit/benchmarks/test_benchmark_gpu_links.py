"""The GPU links benchmark's measurements, between two threads: what they count, not how fast."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_links import render_activations, render_exchange
from benchmarks.gpu_links_measure import NUM_LAYERS, End, Shape
from benchmarks.gpu_links_peer import open_link
from services.worker.channels.base import ChannelKind
from services.worker.channels.factory import ChannelFactory, TensorSizes
from services.worker.links.link import StreamLink
from services.worker.links.shm import create_ring_memory
from tests.fake_ipc import FakeIpcDriver
from tests.torch_ops import TorchOps

CPU = torch.device("cpu")
SHAPE = Shape(block_bytes=1024, part_blocks=16, hidden_bytes=64)


@pytest.fixture(params=[ChannelKind.CUDA_IPC, ChannelKind.HOST])
def near(request: pytest.FixtureRequest) -> Iterator[tuple[End, StreamLink]]:
    """One end, whose other end is served by a thread."""
    sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    rings = create_ring_memory()

    def open_end(end: End, *, is_acceptor: bool) -> StreamLink:
        sizes = TensorSizes(activation_bytes=6400, kv_block_bytes=1024)
        factory = ChannelFactory(CPU, sizes, [request.param], ipc=FakeIpcDriver())
        connection = sockets[is_acceptor]
        return open_link(end, factory, request.param, connection, rings, is_acceptor=is_acceptor)

    def serve() -> None:
        end = End(CPU, TorchOps(), SHAPE)
        link = open_end(end, is_acceptor=True)
        end.serve(link)
        link.close()

    thread = threading.Thread(target=serve)
    thread.start()
    end = End(CPU, TorchOps(), SHAPE)
    link = open_end(end, is_acceptor=False)
    yield end, link
    link.close()
    thread.join(20.0)
    os.close(rings)
    assert not thread.is_alive()


def test_an_exchange_counts_what_was_written(near: tuple[End, StreamLink]) -> None:
    end, link = near
    found = end.exchange(link, 40)
    assert found.num_bytes == 40 * NUM_LAYERS * 16 * 1024
    assert found.bytes_per_second > 0
    assert link.channel.kind.value in render_exchange([found])


def test_an_activation_goes_there_and_back(near: tuple[End, StreamLink]) -> None:
    end, link = near
    found = end.activation(link, num_tokens=100, repetitions=5)
    assert found.seconds > 0
    assert sum(link.stats().tensors.values()) == 2 * 5 * 6400
    assert "100" in render_activations([found])
