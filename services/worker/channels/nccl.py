"""Tensors from GPU to GPU by NCCL's send and receive, between any hosts.

    sender                                                     receiver
    current stream  | copy to slot |--event               event--| use slot | current stream
    lane's stream              ...-| ncclSend |~~~~~~| ncclRecv |-...          lane's stream

A lane is what one class of tensors travels on in one direction: a communicator of two ranks and a
stream of its own at each end. So sends and receives need no grouping: a lane is a queue, both ends
go through it in the order of the frames, and what one lane waits for is never on another one's way
to it. A send occupies its slot until it was received; the host looks whether it has ended, and
nothing on the sender's current stream waits for the receiver.

Making a communicator blocks until both ranks have come, and so does the first send and receive on
it, which connects them. Both happen while the link is set up, in a thread with a deadline; should
the peer not come, that thread stays behind. Whatever else may hang in NCCL is ended by `abort`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import structlog
import torch

from services.worker.channels.base import ChannelError, ChannelKind
from services.worker.channels.deadline import call_within
from services.worker.channels.dialogue import Dialogue, Particulars
from services.worker.channels.nccl_library import Communicator, Event, NcclLibrary
from services.worker.channels.ring import RingChannel, RingSize, RingSizes, require_same_bulk
from services.worker.links.base import LinkClass, LinkDownError
from shared.wire import Message

_PROOF = b"kunserve"
#: One is received into while the other is used.
_INBOX_SLOTS = 2
#: Of the time there is, for communicators; the rest is for telling the peer how it went.
_SHARE = 0.7
#: What a call that should not block gets before its communicator is aborted beside it.
_LOCK_SECONDS = 1.0
_ABORT_SECONDS = 5.0


class LanesOffer(Message):
    """What the peer needs to know of the lanes that lead here."""

    rings: dict[LinkClass, RingSize]
    unique_ids: dict[LinkClass, bytes]


class _Lane:
    """One end of a lane: a ring of slots here, and the way to the other end."""

    def __init__(
        self,
        library: NcclLibrary,
        communicator: Communicator,
        size: RingSize,
        device: torch.device,
    ) -> None:
        self.slot_bytes = size.slot_bytes
        self._library = library
        self._communicator = communicator
        self._stream = library.stream()
        self._slots = torch.empty(
            (size.num_slots, size.slot_bytes), dtype=torch.uint8, device=device
        )
        #: When each slot may be used again, on the lane's stream.
        self._free_from: list[Event | None] = [None] * size.num_slots
        self._position = 0
        self._lock = threading.Lock()
        self._is_aborted = False

    @property
    def _slot(self) -> int:
        """Of the next position."""
        return self._position % len(self._slots)

    @contextmanager
    def _usable(self) -> Iterator[Communicator]:
        """The communicator, which is not aborted meanwhile.

        Raises:
            LinkDownError: it is aborted already.
        """
        with self._lock:
            if self._is_aborted:
                raise LinkDownError("the channel was aborted")
            yield self._communicator

    def abort(self) -> None:
        """End what was launched, and launch nothing any more. Idempotent, from any thread."""
        if self._is_aborted:
            return
        self._is_aborted = True
        has_lock = self._lock.acquire(timeout=_LOCK_SECONDS)
        try:
            self._communicator.abort()
        finally:
            if has_lock:
                self._lock.release()

    def synchronize(self) -> None:
        """Wait until nothing is on the lane."""
        self._stream.synchronize()


class _SendingLane(_Lane):
    """Implements `Outbox`."""

    @property
    def has_room(self) -> bool:
        """Look whether the send of the slot has ended."""
        sent = self._free_from[self._slot]
        return sent is None or sent.query()

    def place(self, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """The next slot."""
        return self._slots[self._slot, :nbytes]

    def depart(self, nbytes: int) -> int:
        """Launch the send behind what was launched to fill the slot."""
        with self._usable() as communicator:
            self._stream.wait_event(self._library.current_stream().record_event())
            communicator.send(self.place(nbytes), self._stream)
            self._free_from[self._slot] = self._stream.record_event()
        self._position += 1
        return self._position - 1

    def connect(self) -> None:
        """Send a first tensor."""
        self.place(len(_PROOF)).copy_(torch.frombuffer(bytearray(_PROOF), dtype=torch.uint8))
        self.depart(len(_PROOF))
        self.synchronize()


class _ReceivingLane(_Lane):
    """Implements `Inbox`."""

    def arrive(self, position: int, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """Launch the receive, and let what is launched next wait for it."""
        if position != self._position or not 0 < nbytes <= self.slot_bytes:
            raise ChannelError(
                f"{nbytes} bytes of position {position} cannot come next, at {self._position}"
            )
        slot, drained = self._slots[self._slot, :nbytes], self._free_from[self._slot]
        with self._usable() as communicator:
            if drained is not None:
                self._stream.wait_event(drained)
            communicator.receive(slot, self._stream)
            self._library.current_stream().wait_event(self._stream.record_event())
        self._position += 1
        return slot

    def drained(self, position: int) -> None:
        """The slot may be received into again behind what was launched so far."""
        event = self._library.current_stream().record_event()
        self._free_from[position % len(self._slots)] = event

    def connect(self) -> None:
        """Receive a first tensor; raises ChannelError where it is not the one that was sent."""
        slot = self.arrive(0, len(_PROOF))
        self.synchronize()
        if bytes(slot.tolist()) != _PROOF:
            raise ChannelError("what the peer sent did not arrive")


class _NcclCarrier:
    """Implements `Carrier`: the lanes of both directions."""

    def __init__(self, library: NcclLibrary) -> None:
        self.receiving: dict[LinkClass, _ReceivingLane] = {}
        self.sending: dict[LinkClass, _SendingLane] = {}
        self._library = library

    def abort(self) -> None:
        """Abort all communicators, in a thread, as even that may hang."""

        def abort_all() -> None:
            self._library.attach()
            for lane in (*self.receiving.values(), *self.sending.values()):
                lane.abort()

        try:
            call_within(_ABORT_SECONDS, abort_all, lambda _: None)
        except TimeoutError:
            structlog.get_logger(component="channel").error("NCCL cannot be aborted")

    def close(self) -> None:
        """Begin to end: what is under way comes to its end, or is aborted; then all is freed."""

        def end() -> None:
            try:
                self._library.attach()
                for lane in (*self.receiving.values(), *self.sending.values()):
                    lane.synchronize()
            except RuntimeError:
                structlog.get_logger(component="channel").exception("a channel does not end well")
            self.abort()
            self.receiving.clear()
            self.sending.clear()

        threading.Thread(target=end, name="channel end", daemon=True).start()


class NcclChannels:
    """Makes channels with one library, for as long as that is in order."""

    def __init__(self, library: NcclLibrary, device: torch.device) -> None:
        self._library = library
        self._device = device
        #: A call has not returned: the library is not to be trusted in this process any more.
        self.is_stuck = False

    @property
    def version(self) -> int:
        """Both ends must have the same."""
        return self._library.version

    def open(self, dialogue: Dialogue, sizes: RingSizes) -> RingChannel:
        """Set a channel up; the peer does the same. Blocks.

        Args:
            sizes: of what the peer sends here.

        Raises:
            ChannelError: it cannot be, which the peer knows too.
            LinkError: the peer is gone.
        """
        own, theirs = dialogue.agree(
            lambda: self._make_offer(sizes), lambda offer: Particulars(offer.encode())
        )
        with ExitStack() as undo:

            def connect() -> _NcclCarrier:
                offer = LanesOffer.decode(theirs.content)
                require_same_bulk(offer.rings, sizes)
                seconds = dialogue.seconds_left * _SHARE
                return undo.enter_context(closing(self._connect(own, offer, seconds)))

            carrier, _ = dialogue.agree(connect)
            undo.pop_all()
        return RingChannel(
            ChannelKind.NCCL, self._device, carrier.sending, carrier.receiving, carrier
        )

    def _make_offer(self, sizes: RingSizes) -> LanesOffer:
        self._library.attach()
        unique_ids = {link_class: self._library.unique_id() for link_class in sizes}
        return LanesOffer(rings=dict(sizes), unique_ids=unique_ids)

    def _connect(self, own: LanesOffer, theirs: LanesOffer, seconds: float) -> _NcclCarrier:
        """All lanes, connected. Raises ChannelError, or what the library raises."""
        try:
            return call_within(
                seconds, lambda: self._connect_all(own, theirs), lambda late: late.close()
            )
        except TimeoutError as error:
            self.is_stuck = True
            raise ChannelError(f"the peer did not come within {seconds:.1f} s") from error

    def _connect_all(self, own: LanesOffer, theirs: LanesOffer) -> _NcclCarrier:
        """Blocks, perhaps for ever. Both ends go through the lanes in the order of their ids."""
        self._library.attach()
        carrier = _NcclCarrier(self._library)
        ways = [(each, link_class, True) for link_class, each in own.unique_ids.items()]
        ways += [(each, link_class, False) for link_class, each in theirs.unique_ids.items()]
        try:
            for unique_id, link_class, is_receiving in sorted(ways):
                communicator = self._library.communicator(unique_id, 0 if is_receiving else 1)
                if is_receiving:
                    size = own.rings[link_class].model_copy(update={"num_slots": _INBOX_SLOTS})
                    receiving = _ReceivingLane(self._library, communicator, size, self._device)
                    carrier.receiving[link_class] = receiving
                    receiving.connect()
                else:
                    size = theirs.rings[link_class]
                    sending = _SendingLane(self._library, communicator, size, self._device)
                    carrier.sending[link_class] = sending
                    sending.connect()
        except BaseException:
            carrier.close()
            raise
        return carrier
