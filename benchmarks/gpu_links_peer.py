"""The far end of the GPU links benchmark, a process that `benchmarks.gpu_links` starts."""

from __future__ import annotations

import argparse
import socket

import torch

from benchmarks.gpu_links_measure import DEADLINE_SECONDS, NUM_LAYERS, End, Shape
from services.worker.channel_options import make_channel_factory
from services.worker.channels.base import ChannelKind
from services.worker.channels.choice import ChannelChoice, ChannelPlan
from services.worker.channels.factory import ChannelFactory, TensorSizes
from services.worker.links.base import LinkPeer
from services.worker.links.config import LinkConfig
from services.worker.links.link import StreamLink
from services.worker.links.shm import ShmStream
from services.worker.settings import WorkerSettings

MIB = 1024**2
#: Hidden states of 3584 and KV of four heads of 128, as Qwen2.5-7B has them, in 16 bits.
SHAPE = Shape(block_bytes=2 * 16 * 4 * 128 * 2, part_blocks=16, hidden_bytes=3584 * 2)
MAX_NUM_TOKENS = 2048
_PEER = LinkPeer("bench", "bench", 1, 1)


def make_factory(device: torch.device) -> ChannelFactory:
    """What a worker on that GPU has."""
    if NUM_LAYERS * SHAPE.part_blocks * SHAPE.block_bytes > 4 * MIB:
        raise ValueError("a part does not fit a slot")
    sizes = TensorSizes(MAX_NUM_TOKENS * SHAPE.hidden_bytes, SHAPE.block_bytes)
    return make_channel_factory(WorkerSettings(worker_id="bench"), device, sizes)


def open_link(
    end: End,
    factory: ChannelFactory,
    kind: ChannelKind,
    connection: socket.socket,
    rings: int,
    *,
    is_acceptor: bool,
) -> StreamLink:
    """One end of a link over a connected unix socket, as the handshake leaves it; blocks."""
    plan = ChannelPlan(ChannelChoice((kind,), ""), num_activations=2, seconds=DEADLINE_SECONDS)
    stream = ShmStream(connection, rings, is_acceptor)
    tensors = factory.establish(connection, plan)
    link = StreamLink(stream, _PEER, LinkConfig(), end.on_frame, end.on_down, tensors=tensors)
    link.start()
    return link


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", type=ChannelKind)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("connection", type=int)
    parser.add_argument("rings", type=int)
    arguments = parser.parse_args()
    from services.worker.kernels.cuda.ops import TritonOps  # needs Triton, so not before

    end = End(arguments.device, TritonOps(), SHAPE)
    factory = make_factory(arguments.device)
    connection = socket.socket(fileno=arguments.connection)
    link = open_link(end, factory, arguments.kind, connection, arguments.rings, is_acceptor=True)
    end.serve(link)
    link.close()


if __name__ == "__main__":
    main()
