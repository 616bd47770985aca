"""The other end of a channel in tests: here, or `python -m tests.channel_peer` in a process.

test   near channel ------------------- tensors -------------------- far channel
       FarEnd      -- commands, packed buffers over the same socket --> serve()
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
import torch

from services.worker.channels.base import ChannelKind, Packed, TensorChannel
from services.worker.channels.choice import ChannelChoice, ChannelPlan
from services.worker.channels.factory import ChannelFactory, EstablishedChannel, TensorSizes
from services.worker.channels.nccl import NcclChannels
from services.worker.channels.nccl_library import load_nccl
from services.worker.channels.ring import RingSize, RingSizes
from services.worker.links.base import LinkClass
from services.worker.memory.cuda_driver import CudaDriver
from services.worker.memory.cuda_ipc import CudaIpc
from tests.fake_ipc import FakeIpcDriver

_LENGTH = struct.Struct("<I")
SECONDS = 60.0
_WORDS_BYTES = 64
SLOT_BYTES = 32 * 1024
NUM_SLOTS = {LinkClass.CONTROL: 3, LinkClass.EXCHANGE: 4, LinkClass.RESTORE: 2}


@dataclass(frozen=True, slots=True)
class SmallSizes(TensorSizes):
    """Slots that a test fills at once."""

    activation_bytes: int = 0
    kv_block_bytes: int = 0

    def rings(self, num_activations: int) -> RingSizes:
        return {
            each: RingSize(num_slots=count, slot_bytes=SLOT_BYTES)
            for each, count in NUM_SLOTS.items()
        }


def plan_for(kind: ChannelKind) -> ChannelPlan:
    return ChannelPlan(ChannelChoice((kind,), ""), num_activations=2, seconds=SECONDS)


def content_of(tensor: torch.Tensor) -> bytes:
    """What a tensor of bytes holds, wherever it is."""
    return tensor.cpu().numpy().tobytes()


def tensor_of(content: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)


def carried(packed: Packed) -> list[memoryview]:
    """Buffers as a link delivers them: memory of the receiver's own."""
    return [memoryview(bytearray(buffer)) for buffer in packed]


class FarEnd(Protocol):
    """What a test lets the other end do."""

    def take(self, packed: Packed) -> bytes:
        """Receive a tensor."""
        ...

    def pack(self, content: bytes, link_class: LinkClass) -> Packed:
        """Send an activation."""
        ...

    def put(self, content: bytes, link_class: LinkClass) -> Packed:
        """Send bulk."""
        ...

    def has_room(self, link_class: LinkClass) -> bool: ...

    def close(self) -> None: ...


class LocalEnd:
    """Implements `FarEnd` with a channel of this process."""

    def __init__(self, channel: TensorChannel, device: torch.device) -> None:
        self.channel = channel
        self._device = device

    def take(self, packed: Packed) -> bytes:
        with self.channel.received(carried(packed)) as tensor:
            return content_of(tensor)

    def pack(self, content: bytes, link_class: LinkClass) -> Packed:
        return self.channel.pack(tensor_of(content, self._device), link_class)

    def put(self, content: bytes, link_class: LinkClass) -> Packed:
        tensor = tensor_of(content, self._device)
        return self.channel.put(len(content), link_class, lambda place: place.copy_(tensor))

    def has_room(self, link_class: LinkClass) -> bool:
        return self.channel.has_room(link_class)

    def close(self) -> None:
        self.channel.close()


class RemoteEnd:
    """Implements `FarEnd` with a process that serves it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def take(self, packed: Packed) -> bytes:
        content: bytes = self._ask("take", [bytes(buffer) for buffer in packed])
        return content

    def pack(self, content: bytes, link_class: LinkClass) -> Packed:
        packed: list[bytes] = self._ask("pack", content, link_class)
        return packed

    def put(self, content: bytes, link_class: LinkClass) -> Packed:
        packed: list[bytes] = self._ask("put", content, link_class)
        return packed

    def has_room(self, link_class: LinkClass) -> bool:
        return bool(self._ask("has_room", link_class))

    def close(self) -> None:
        self._ask("close")

    def _ask(self, command: str, *arguments: object) -> Any:
        send(self._connection, [command, *arguments])
        return receive(self._connection)


def send(connection: socket.socket, message: object) -> None:
    data = msgpack.packb(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """The next message; EOFError at the end."""
    (length,) = _LENGTH.unpack(read(connection, _LENGTH.size))
    return msgpack.unpackb(read(connection, length))


def read(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = connection.recv(nbytes - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def serve(connection: socket.socket, end: LocalEnd) -> None:
    """Do what the other process says until it hangs up."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            command, *arguments = receive(connection)
            result = getattr(end, command)(*arguments)
            send(connection, result)


Establish = Callable[[socket.socket], EstablishedChannel]


def establish_both(
    near: Establish, far: Establish, ends: tuple[socket.socket, socket.socket]
) -> tuple[EstablishedChannel, EstablishedChannel]:
    """Two ends that are set up at the same time, each in its thread."""
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(each, end) for each, end in zip((near, far), ends, strict=True)]
        return results[0].result(SECONDS), results[1].result(SECONDS)


def process_factory(kind: ChannelKind, device: torch.device) -> ChannelFactory:
    """What a process of its own uses: a real GPU, or host memory that behaves like one's."""
    if device.type == "cpu":
        return ChannelFactory(device, SmallSizes(), [kind], ipc=FakeIpcDriver(SECONDS))
    torch.cuda.set_device(device)
    driver = CudaDriver(device.index)
    return ChannelFactory(
        device,
        SmallSizes(),
        [kind],
        ipc=CudaIpc(driver, lambda: int(torch.cuda.current_stream(device).cuda_stream)),
        nccl=NcclChannels(load_nccl(device), device) if kind is ChannelKind.NCCL else None,
    )


class PeerProcess:
    """A process with the other ends of channels, which it sets up when it is told to."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "tests.channel_peer", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    @contextlib.contextmanager
    def open(
        self, factory: ChannelFactory, kind: ChannelKind, device: torch.device
    ) -> Iterator[tuple[TensorChannel, RemoteEnd]]:
        """A channel to the process."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            words = f"{kind.value} {device}".encode().ljust(_WORDS_BYTES)
            socket.send_fds(self._connection, [words], [far.fileno()])
        with near:
            channel = factory.establish(near, plan_for(kind)).channel
            yield channel, RemoteEnd(near)
            channel.close()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(SECONDS)
        self._connection.close()


def serve_channel(connection: socket.socket, words: str) -> None:
    """Set one up and let it be used until the other side hangs up."""
    kind, device = ChannelKind(words.split()[0]), torch.device(words.split()[1])
    with connection:
        factory = process_factory(kind, device)
        channel = factory.establish(connection, plan_for(kind)).channel
        serve(connection, LocalEnd(channel, device))
        channel.close()


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            words, files, _, _ = socket.recv_fds(control, _WORDS_BYTES, 1)
            if not words:
                return
            connection = socket.socket(fileno=files[0])
            threading.Thread(
                target=serve_channel, args=(connection, words.decode()), daemon=True
            ).start()


if __name__ == "__main__":
    main()
