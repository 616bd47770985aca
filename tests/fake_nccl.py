"""NCCL's send and receive between two "ranks" of this process, with the ways in which it can hang.

A communicator is there when both ranks have come. The first send and the first receive on it find
each other on the host. A send ends with its receive, on the stream that it was launched on; the two
must be of one size. Streams are threads; the current stream is the calling thread itself, which
does at once what it is told and waits where it has to, but not for ever.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_DEADLINE_SECONDS = 10.0


class FakeNcclError(RuntimeError):
    """What the library refuses."""


class FakeEvent:
    """A moment on a stream."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def happen(self) -> None:
        self._is_over.set()

    def query(self) -> bool:
        return self._is_over.is_set()

    def wait(self) -> None:
        if not self._is_over.wait(_DEADLINE_SECONDS):
            raise TimeoutError("a stream waits for what never happens")


class FakeStream:
    """A thread that does what is launched, in order."""

    def __init__(self) -> None:
        self._launched: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="fake stream", daemon=True).start()

    def launch(self, work: Callable[[], None]) -> None:
        self._launched.put(work)

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        self.launch(event.happen)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.launch(event.wait)

    def synchronize(self) -> None:
        self.record_event().wait()

    def _run(self) -> None:
        while True:
            self._launched.get()()


class CurrentStream:
    """The calling thread."""

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.happen()
        return event

    def wait_event(self, event: FakeEvent) -> None:
        event.wait()

    def synchronize(self) -> None:
        """All is done."""


@dataclass
class _Pair:
    """What two ranks share."""

    arrived: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    connected: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    changed: threading.Condition = field(default_factory=threading.Condition)
    sent: list[torch.Tensor] = field(default_factory=list)
    num_received: int = 0
    is_aborted: bool = False

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """False where the pair was aborted."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_aborted or condition())
            return not self.is_aborted


class Fabric:
    """What ranks find each other on."""

    def __init__(self) -> None:
        self._pairs: dict[bytes, _Pair] = {}
        self._lock = threading.Lock()

    def pair(self, unique_id: bytes) -> _Pair:
        with self._lock:
            return self._pairs.setdefault(unique_id, _Pair())


class FakeNcclLibrary:
    """Implements `NcclLibrary`."""

    def __init__(self, fabric: Fabric, version: int = 22809) -> None:
        self.version = version
        self.current = CurrentStream()
        self._fabric = fabric

    def attach(self) -> None:
        """Nothing is bound to threads."""

    def unique_id(self) -> bytes:
        return secrets.token_bytes(128)

    def communicator(self, unique_id: bytes, rank: int) -> FakeCommunicator:
        pair = self._fabric.pair(unique_id)
        pair.arrived.wait()
        return FakeCommunicator(pair)

    def stream(self) -> FakeStream:
        return FakeStream()

    def current_stream(self) -> CurrentStream:
        return self.current


class FakeCommunicator:
    """Implements `Communicator`."""

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self._is_connected = False

    def send(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        pair = self._connect()

        def send() -> None:
            with pair.changed:
                pair.sent.append(tensor.clone())
                number = len(pair.sent)
                pair.changed.notify_all()
            pair.wait_for(lambda: pair.num_received >= number)

        stream.launch(send)

    def receive(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        pair = self._connect()

        def receive() -> None:
            if not pair.wait_for(lambda: len(pair.sent) > pair.num_received):
                return
            sent = pair.sent[pair.num_received]
            if sent.nbytes != tensor.nbytes:
                return  # real kernels would hang, or write past the end
            tensor.copy_(sent)
            with pair.changed:
                pair.num_received += 1
                pair.changed.notify_all()

        stream.launch(receive)

    def abort(self) -> None:
        with self._pair.changed:
            self._pair.is_aborted = True
            self._pair.changed.notify_all()

    def _connect(self) -> _Pair:
        if self._pair.is_aborted:
            raise FakeNcclError("the communicator was aborted")
        if not self._is_connected:
            self._pair.connected.wait()
            self._is_connected = True
        return self._pair
