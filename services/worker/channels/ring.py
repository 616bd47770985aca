"""What both GPU channels have in common: tensors in slots of a ring, tickets for them in frames.

    sender    position 0   1   2   3   4 ...          one ring for each class in each direction
                       |   |   |   |   |
    ring            [ slot 0 | slot 1 | slot 2 ]      position p lies in slot p % 3
                       ^ free again once the tensor of position 0 was drained

A ticket says which position of which class's ring a tensor has, and how long it is. Slots are of
one size, and a class has a fixed number of them, so what is launched but not drained is bounded.
Bulk waits for a free slot as it waits for a clogged link. An activation must not wait: where there
is no slot for it, it goes in its frame, through the host.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

import structlog
import torch

from services.worker.channels.base import (
    ChannelError,
    ChannelKind,
    Direction,
    Packed,
    Traffic,
    Write,
)
from services.worker.channels.host import HostChannel
from services.worker.links.base import Buffer, LinkClass
from shared.wire import WireModel

_TICKET = struct.Struct("<B7xQQ")
#: Longer than it takes all members of a group to notice that one of them is dead.
_GRACE_SECONDS = 1.0
#: In the place of a ticket: the next buffer is the tensor.
_NO_TICKET = b""


class RingSize(WireModel):
    """Slots of one class in one direction."""

    num_slots: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return self.num_slots * self.slot_bytes


#: The rings in one direction.
RingSizes = Mapping[LinkClass, RingSize]


def require_same_bulk(there: RingSizes, here: RingSizes) -> None:
    """Both ends cut bulk into parts on their own; raises ChannelError where they would differ."""
    for link_class in (LinkClass.EXCHANGE, LinkClass.RESTORE):
        if there[link_class].slot_bytes != here[link_class].slot_bytes:
            raise ChannelError(
                f"slots of {there[link_class].slot_bytes} bytes for {link_class.name.lower()} do"
                f" not go with slots of {here[link_class].slot_bytes}"
            )


class Ticket(NamedTuple):
    """What a frame carries in the place of a tensor."""

    link_class: LinkClass
    position: int
    nbytes: int

    def encode(self) -> bytes:
        """The frame's buffer."""
        return _TICKET.pack(*self)

    @classmethod
    def decode(cls, buffer: Buffer) -> Self:
        """Raises ChannelError where the buffer is no ticket."""
        try:
            number, position, nbytes = _TICKET.unpack(buffer)
            return cls(LinkClass(number), position, nbytes)
        except (struct.error, ValueError) as error:
            raise ChannelError(f"a frame's buffer is no ticket: {error}") from error


class Outbox(Protocol):
    """The sending end of one ring."""

    @property
    def slot_bytes(self) -> int:
        """Length of a slot."""
        ...

    @property
    def has_room(self) -> bool:
        """True if the slot of the next position is free."""
        ...

    def place(self, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """Where the next tensor belongs; the slot must be free."""
        ...

    def depart(self, nbytes: int) -> int:
        """Let go what was launched to write there; returns its position."""
        ...


class Inbox(Protocol):
    """The receiving end of one ring."""

    def arrive(self, position: int, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """What lies there, for what is launched next.

        Raises:
            ChannelError: nothing can lie there.
        """
        ...

    def drained(self, position: int) -> None:
        """What was launched so far is the last to touch it."""
        ...


class Carrier(Protocol):
    """What both directions share: memory, communicators."""

    def abort(self) -> None:
        """Let no stream wait for the peer any more, at once. Idempotent, from any thread."""
        ...

    def close(self) -> None:
        """Begin to free everything, when what was launched has ended; not to be waited for."""
        ...


class RingChannel:
    """Implements `TensorChannel` over rings."""

    def __init__(
        self,
        kind: ChannelKind,
        device: torch.device,
        outboxes: Mapping[LinkClass, Outbox],
        inboxes: Mapping[LinkClass, Inbox],
        carrier: Carrier,
    ) -> None:
        """Take both ends of the rings; classes without one have nothing that travels this way."""
        self.kind = kind
        self.part_bytes = outboxes[LinkClass.EXCHANGE].slot_bytes
        self._outboxes = outboxes
        self._inboxes = inboxes
        self._carrier = carrier
        self._host = HostChannel(device)
        self._num_bytes = dict.fromkeys(Direction, 0)
        self._is_open = True
        self._is_aborting = False
        self._has_told = False
        self._log = structlog.get_logger(component="channel", channel=kind.value)

    def has_room(self, link_class: LinkClass) -> bool:
        """True if the next slot of that class is free."""
        outbox = self._outboxes.get(link_class)
        return self._is_open and outbox is not None and outbox.has_room

    def pack(self, tensor: torch.Tensor, link_class: LinkClass) -> Packed:
        """Copy a tensor into the next slot, or into the frame."""
        content = tensor.flatten().view(torch.uint8)
        if self.has_room(link_class) and self._fits(tensor.nbytes, link_class):
            return self.put(tensor.nbytes, link_class, lambda place: place.copy_(content))
        if not self._has_told:
            self._has_told = True
            reason = "it fits no slot" if self.has_room(link_class) else "no slot is free"
            self._log.warning("an activation goes through the host", reason=reason)
        return (_NO_TICKET, *self._host.pack(content, link_class))

    def put(self, nbytes: int, link_class: LinkClass, write: Write) -> Packed:
        """Write into the next slot; if `write` raises, nothing was sent."""
        if not (self.has_room(link_class) and self._fits(nbytes, link_class)):
            raise ChannelError(f"no room for {nbytes} bytes of {link_class.name.lower()}")
        outbox = self._outboxes[link_class]
        write(outbox.place(nbytes))
        ticket = Ticket(link_class, outbox.depart(nbytes), nbytes)
        self._num_bytes[Direction.SENT] += nbytes
        return (ticket.encode(),)

    def _fits(self, nbytes: int, link_class: LinkClass) -> bool:
        return 0 < nbytes <= self._outboxes[link_class].slot_bytes

    @contextmanager
    def received(self, packed: Packed) -> Iterator[torch.Tensor]:  # [nbytes] uint8
        """What lies in the slot of a ticket, or in the frame."""
        if len(packed) > 1:
            with self._host.received(packed[1:]) as tensor:
                yield tensor
            return
        ticket = Ticket.decode(packed[0] if packed else _NO_TICKET)
        inbox = self._inboxes.get(ticket.link_class)
        if inbox is None or not self._is_open:
            raise ChannelError(f"there is no ring of {ticket.link_class.name.lower()} here")
        tensor = inbox.arrive(ticket.position, ticket.nbytes)
        self._num_bytes[Direction.RECEIVED] += ticket.nbytes
        try:
            yield tensor
        finally:
            inbox.drained(ticket.position)

    def traffic(self) -> Traffic:
        """Bytes of tensors so far, those through the host apart."""
        own = Counter({(self.kind, each): count for each, count in self._num_bytes.items()})
        return own + Counter(self._host.traffic())

    def abort(self) -> None:
        """Let no stream wait for the peer any more, after a while."""
        if not self._is_aborting:
            self._is_aborting = True
            timer = threading.Timer(_GRACE_SECONDS, self._carrier.abort)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """Free the rings once nothing uses them."""
        if self._is_open:
            self._is_open = False
            self.abort()
            self._carrier.close()
