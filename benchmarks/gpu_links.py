"""`python -m benchmarks.gpu_links`: KV and activations between two processes on one GPU.

Through CUDA IPC and, to compare, through host memory. Has never run on a GPU; where there is none
it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_links_measure import ActivationFinding, End, ExchangeFinding
from benchmarks.gpu_links_peer import MAX_NUM_TOKENS, SHAPE, make_factory, open_link
from benchmarks.machine import inspect_machine, versions
from benchmarks.report import Report, Table
from services.worker.channels.base import ChannelKind
from services.worker.device import select_device
from services.worker.links.link import StreamLink
from services.worker.links.shm import create_ring_memory
from services.worker.settings import Device
from shared.errors import ConfigError

KINDS = (ChannelKind.CUDA_IPC, ChannelKind.HOST)
NUM_TOKENS = (1, 32, MAX_NUM_TOKENS)
NUM_PARTS, REPETITIONS = 1000, 200


@contextlib.contextmanager
def linked(end: End, kind: ChannelKind, device: torch.device) -> Iterator[StreamLink]:
    """A link to another process, which ends with it."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    rings = create_ring_memory()
    command = [sys.executable, "-m", "benchmarks.gpu_links_peer", kind.value, str(device)]
    with far:
        process = subprocess.Popen(
            [*command, str(far.fileno()), str(rings)], pass_fds=(far.fileno(), rings)
        )
    try:
        link = open_link(end, make_factory(device), kind, near, rings, is_acceptor=False)
        os.close(rings)
        yield link
        link.close()
    finally:
        process.kill()
        process.wait()


def render_exchange(findings: Sequence[ExchangeFinding]) -> str:
    rows = [
        [one.channel, f"{one.num_bytes / 1e9:.1f} GB", f"{one.bytes_per_second / 1e9:.1f}"]
        for one in findings
    ]
    return Table(["exchange, gather to scatter", "KV", "GB/s"], rows).render()


def render_activations(findings: Sequence[ActivationFinding]) -> str:
    rows = [[one.channel, str(one.num_tokens), f"{one.seconds * 1e6:.0f}"] for one in findings]
    return Table(["activation, one way", "tokens", "µs, p50"], rows).render()


def run(arguments: argparse.Namespace) -> None:
    device = select_device(Device.CUDA)
    from services.worker.kernels.cuda.ops import TritonOps  # needs Triton, so not before

    report = Report("Links between two workers on one GPU")
    report.add(
        f"{torch.cuda.get_device_name(device)}; {inspect_machine().describe()};"
        f" {versions(['torch', 'triton', 'cuda-bindings'])}."
    )
    exchanges, activations = [], []
    for kind in KINDS:
        end = End(device, TritonOps(), SHAPE)
        with linked(end, kind, device) as link:
            end.exchange(link, NUM_PARTS // 10)  # compiles the kernels
            exchanges.append(end.exchange(link, NUM_PARTS))
            activations += [end.activation(link, count, REPETITIONS) for count in NUM_TOKENS]
    report.add(render_exchange(exchanges))
    report.add(render_activations(activations))
    found = {
        "exchange": [asdict(one) for one in exchanges],
        "activation": [asdict(one) for one in activations],
    }
    report.save(arguments.out, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_links"))
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ConfigError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
