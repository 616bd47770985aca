"""Tensors straight into the memory of another process's GPU, on the same host or the same GPU.

    receiver's inbox   | activations 0 | 1 | 2 | exchange 0 | ... | 7 | restore 0 | ... | 3 |
    (cuMemAlloc)              ^                                                  | launched behind
                              | copied by the sender's stream, which raises      v what reads it
    words (host)         filled 0  --- waited for by the receiver's stream    drained 0

Each side has an inbox and opens the other's. It lies outside the chunks of weights and KV, as only
memory of `cuMemAlloc` can be opened by other processes, and is allocated before anything is given
up. The sender copies, or gathers, into a slot and has its stream raise the slot's `filled` word;
then its ticket goes into a frame. The receiver has its stream wait for the word, uses the tensor
where it lies, and has its stream raise `drained`. Only tickets pass through the hosts.

The end has an order: whoever has opened an inbox closes it before its owner frees it. Who opened it
holds the end of a pipe for so long, a life line, which the system cuts if that process dies.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import ExitStack, closing

import structlog
import torch

from services.worker.channels.base import ChannelError, ChannelKind
from services.worker.channels.dialogue import Dialogue, Particulars
from services.worker.channels.ipc_driver import IpcDriver
from services.worker.channels.ring import RingChannel, RingSize, RingSizes, require_same_bulk
from services.worker.channels.words import PROOF, SharedWords, drained, filled, words_bytes
from services.worker.links.base import LinkClass
from services.worker.links.files import close_all, create_sealed
from services.worker.memory.errors import DeviceMemoryError
from services.worker.memory.tensors import tensor_at
from shared.wire import Message

_PROOF = b"kunserve"
_PROOF_WORD = 1
#: What a living peer gets to let an inbox go; then its memory is lost until this process ends.
_FAREWELL_SECONDS = 60.0


class InboxOffer(Message):
    """An inbox as the peer needs to know it; words and life line go with it as descriptors."""

    rings: dict[LinkClass, RingSize]
    handle: bytes


class _Ring:
    """One class's slots in an inbox: where a position lies, at either end."""

    def __init__(
        self,
        size: RingSize,
        address: int,
        first_slot: int,
        words: SharedWords,
        device: torch.device,
    ) -> None:
        self.slot_bytes = size.slot_bytes
        self._num_slots = size.num_slots
        self._address = address
        self._first_slot = first_slot
        self._words = words
        self._device = device

    def _turn(self, position: int) -> int:
        """How often the slot of a position was used before."""
        return position // self._num_slots

    def _slot(self, position: int) -> int:
        return self._first_slot + position % self._num_slots

    def _tensor(self, position: int, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        offset = position % self._num_slots * self.slot_bytes
        return tensor_at(self._address + offset, (nbytes,), torch.uint8, self._device)


class _SendingRing(_Ring):
    """Implements `Outbox`: slots of the other process's inbox."""

    _position = 0

    @property
    def has_room(self) -> bool:
        """Look at the word that the other device writes."""
        return self._words[drained(self._slot(self._position))] == self._turn(self._position)

    def place(self, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """The next slot, in the other device's memory."""
        return self._tensor(self._position, nbytes)

    def depart(self, nbytes: int) -> int:
        """Raise the slot's word behind what was launched to fill it."""
        position, self._position = self._position, self._position + 1
        self._words.launch_write(filled(self._slot(position)), self._turn(position) + 1)
        return position


class _ReceivingRing(_Ring):
    """Implements `Inbox`."""

    def arrive(self, position: int, nbytes: int) -> torch.Tensor:  # [nbytes] uint8
        """Let what is launched next wait for the slot's word."""
        if not 0 < nbytes <= self.slot_bytes:
            raise ChannelError(f"{nbytes} bytes cannot lie in a slot of {self.slot_bytes}")
        self._words.launch_wait(filled(self._slot(position)), self._turn(position) + 1)
        return self._tensor(position, nbytes)

    def drained(self, position: int) -> None:
        """Raise the slot's other word behind what was launched to read it."""
        self._words.launch_write(drained(self._slot(position)), self._turn(position) + 1)


class _OwnInbox:
    """Memory that the peer writes to."""

    def __init__(self, driver: IpcDriver, sizes: RingSizes, device: torch.device) -> None:
        """Allocate it. Raises DeviceMemoryError or OSError; nothing is left then."""
        self.sizes = sizes
        self._driver = driver
        with ExitStack() as held:
            self._life_line, their_end = os.pipe()
            self._passed_on = [their_end]
            held.callback(lambda: close_all([self._life_line, *self._passed_on]))
            self._address = driver.allocate(sum(size.num_bytes for size in sizes.values()))
            held.callback(driver.free, self._address)
            self._handle = driver.export_memory(self._address)
            num_slots = sum(size.num_slots for size in sizes.values())
            words_file = create_sealed("kunserve-words", words_bytes(num_slots))
            self._passed_on.insert(0, words_file)
            self.words = SharedWords(driver, words_file, num_slots)
            held.pop_all()
        self.rings = {
            link_class: _ReceivingRing(*place, self.words, device)
            for link_class, place in _places(sizes, self._address).items()
        }

    def offer(self) -> Particulars:
        """What the peer needs; once."""
        content = InboxOffer(rings=dict(self.sizes), handle=self._handle).encode()
        return Particulars(content, self._passed_on)

    def check_proof(self) -> None:
        """What the peer has written must be here, and the device must be able to wait for it.

        Raises:
            ChannelError: it is not.
            DeviceMemoryError: it cannot.
        """
        if self._driver.read(self._address, len(_PROOF)) != _PROOF:
            raise ChannelError("what the peer wrote to this GPU did not arrive")
        if self.words[PROOF] != _PROOF_WORD:
            raise ChannelError("what the peer's GPU wrote to the host did not arrive")
        self.words.launch_wait(PROOF, _PROOF_WORD)

    def close(self) -> None:
        """Free it when the peer has let it go, or is dead; this device must be done with it."""
        self.words.close()
        line = select.poll()
        line.register(self._life_line, 0)  # that the other end is closed is told in any case
        if line.poll(_FAREWELL_SECONDS * 1000):
            self._driver.free(self._address)
        else:
            structlog.get_logger(component="channel").error("a peer does not let memory go")
        os.close(self._life_line)


class _PeersInbox:
    """The peer's inbox, opened here."""

    def __init__(
        self, driver: IpcDriver, theirs: Particulars, own_sizes: RingSizes, device: torch.device
    ) -> None:
        """Open it, and leave a proof there; the descriptors are its own from now on.

        Raises DeviceMemoryError, LinkError or MessageError; nothing is left then.
        """
        with ExitStack() as held:
            held.callback(close_all, theirs.files)
            offer = InboxOffer.decode(theirs.content)
            require_same_bulk(offer.rings, own_sizes)
            if len(theirs.files) != 2:
                raise ChannelError("the peer's memory came without its words and its life line")
            words_file, _ = theirs.files
            num_slots = sum(size.num_slots for size in offer.rings.values())
            words = SharedWords(driver, words_file, num_slots)
            held.callback(words.close)
            address = driver.open_memory(offer.handle)
            held.callback(driver.close_memory, address)
            driver.write(address, _PROOF)
            words.launch_write(PROOF, _PROOF_WORD)
            driver.synchronize()
            self._held = held.pop_all()
        self.rings = {
            link_class: _SendingRing(*place, words, device)
            for link_class, place in _places(offer.rings, address).items()
        }

    def close(self) -> None:
        """Close it, and cut the life line at last; this device must be done with it."""
        self._held.close()


class _IpcCarrier:
    """Implements `Carrier`: both inboxes."""

    def __init__(self, driver: IpcDriver, words: SharedWords, held: ExitStack) -> None:
        self._driver = driver
        self._words = words
        self._held = held

    def abort(self) -> None:
        """Let go the streams that wait for the peer's."""
        self._words.release()

    def close(self) -> None:
        """Begin to free everything."""
        _begin_to_free(self._driver, self._held)


def _begin_to_free(driver: IpcDriver, held: ExitStack) -> None:
    """In a thread of its own, as it waits for the device, and then for the peer."""

    def free() -> None:
        try:
            driver.attach()
            driver.synchronize()
            held.close()
        except DeviceMemoryError:
            structlog.get_logger(component="channel").exception("a channel does not end well")

    threading.Thread(target=free, name="channel end", daemon=True).start()


def _places(sizes: RingSizes, address: int) -> dict[LinkClass, tuple[RingSize, int, int]]:
    """Where each class's slots begin in an inbox: size, address and number of the first."""
    places, first_slot = {}, 0
    for link_class, size in sorted(sizes.items()):
        places[link_class] = (size, address, first_slot)
        address += size.num_bytes
        first_slot += size.num_slots
    return places


def open_ipc_channel(
    dialogue: Dialogue, driver: IpcDriver, device: torch.device, sizes: RingSizes
) -> RingChannel:
    """Set a channel up; the peer does the same. Blocks.

    Args:
        sizes: of what the peer sends here.

    Raises:
        ChannelError: it cannot be, which the peer knows too.
        LinkError: the peer is gone.
    """
    held = ExitStack()

    def allocate() -> _OwnInbox:
        driver.attach()
        return held.enter_context(closing(_OwnInbox(driver, sizes, device)))

    try:
        own, theirs = dialogue.agree(allocate, _OwnInbox.offer)
        peers, _ = dialogue.agree(
            lambda: held.enter_context(closing(_PeersInbox(driver, theirs, sizes, device)))
        )
        dialogue.agree(own.check_proof)
    except BaseException:
        _begin_to_free(driver, held)
        raise
    carrier = _IpcCarrier(driver, own.words, held)
    return RingChannel(ChannelKind.CUDA_IPC, device, peers.rings, own.rings, carrier)
