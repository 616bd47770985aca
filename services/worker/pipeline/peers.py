"""A worker's place in a group, and its links to the other members.

Tensors go by the channel of each link, in or beside the frame of the message they belong to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from services.worker.channels.base import Packed, Write
from services.worker.engine.routes import Route
from services.worker.links.base import (
    Link,
    LinkClass,
    LinkDownError,
    LinkFrame,
    PeerMemory,
)
from services.worker.pipeline.messages import FrameKind
from shared.layout import GroupPlan, Span
from shared.wire import Message

_BULK_CLASSES = (LinkClass.EXCHANGE, LinkClass.RESTORE)


@dataclass(frozen=True, slots=True)
class GroupKey:
    """Identifies a group for as long as it stays as it is; frames carry it."""

    group_id: str
    epoch: int


class BulkContent(NamedTuple):
    """KV or weights: `write` launches what makes a tensor of so many bytes."""

    nbytes: int
    write: Write


class GroupPeers:
    """The other members of a group as one of them reaches them.

    Sending to a member whose link is down does nothing: the link says so itself, once, and then
    the group is over.
    """

    def __init__(self, worker_id: str, group: GroupPlan, links: Mapping[str, Link]) -> None:
        """Take the links to all other members; they belong to the group from now on."""
        self.worker_id = worker_id
        self.group = group
        self.key = GroupKey(group.group_id, group.epoch)
        self.route = Route.of_group(group, group.epoch)
        self._links = dict(links)
        self._bulk: dict[tuple[str, LinkClass], deque[LinkFrame]] = {
            (peer, link_class): deque() for peer in links for link_class in _BULK_CLASSES
        }
        self._position = self.route.worker_ids.index(worker_id)

    @property
    def span(self) -> Span:
        """The layers of this member."""
        return self.group.members[self._position].span

    @property
    def leader(self) -> str:
        """The member of stage 0."""
        return self.route.leader

    @property
    def is_leader(self) -> bool:
        """True for the member of stage 0."""
        return self._position == 0

    @property
    def next_worker_id(self) -> str | None:
        """The member of the next stage; None for the last one."""
        following = self.route.worker_ids[self._position + 1 :]
        return following[0] if following else None

    @property
    def previous_worker_id(self) -> str:
        """The member of the stage before; the leader has none."""
        return self.route.worker_ids[self._position - 1]

    @property
    def followers(self) -> tuple[str, ...]:
        """All members but the leader."""
        return self.route.worker_ids[1:]

    @property
    def is_connected(self) -> bool:
        """True while all links are up."""
        return all(link.is_up for link in self._links.values())

    def is_up(self, worker_id: str) -> bool:
        """True while the link to a member is up."""
        return self._links[worker_id].is_up

    def has_link(self, link: Link) -> bool:
        """True if `link` is one of the group's."""
        return any(own is link for own in self._links.values())

    def send(
        self,
        worker_id: str,
        kind: FrameKind,
        message: Message,
        activation: torch.Tensor | None = None,
    ) -> None:
        """Send a control message, perhaps with an activation, which may be overwritten at once."""
        link = self._links[worker_id]
        try:
            packed: Packed = ()
            if activation is not None and link.is_up:
                packed = link.channel.pack(activation, LinkClass.CONTROL)
            link.send(self._frame(kind, message, packed), LinkClass.CONTROL)
        except LinkDownError:
            return

    def send_next(
        self, kind: FrameKind, message: Message, activation: torch.Tensor | None = None
    ) -> None:
        """Send down the chain of stages; the last one has nobody to send to."""
        if self.next_worker_id is not None:
            self.send(self.next_worker_id, kind, message, activation)

    def send_bulk(
        self,
        worker_id: str,
        link_class: LinkClass,
        kind: FrameKind,
        message: Message,
        content: BulkContent | None = None,
    ) -> None:
        """Queue KV or weights for a member that is not clogged; None: they are told where to read.

        If `write` raises, nothing was sent.
        """
        try:
            packed: Packed = ()
            if content is not None:
                channel = self._links[worker_id].channel
                packed = channel.put(content.nbytes, link_class, content.write)
        except LinkDownError:
            return
        self._bulk[worker_id, link_class].append(self._frame(kind, message, packed))
        self.push_bulk()

    def received(
        self, worker_id: str, packed: Packed
    ) -> AbstractContextManager[torch.Tensor]:  # [nbytes] uint8
        """The tensor that came with a frame; see `TensorChannel.received`.

        Every one must be taken, in order, also where nobody wants it: see `discard`.

        Raises:
            LinkDownError: it will not come any more.
        """
        return self._links[worker_id].channel.received(packed)

    def discard(self, worker_id: str, packed: Packed) -> None:
        """Take a tensor that nobody wants, if there is one with the frame."""
        if packed:
            with suppress(LinkDownError), self.received(worker_id, packed):
                pass

    def part_bytes(self, worker_id: str) -> int:
        """Into what parts KV and weights for a member, or from it, are cut."""
        return self._links[worker_id].channel.part_bytes

    def memory_of(self, worker_id: str) -> PeerMemory | None:
        """The memory of a member that may be read, and that in turn may read this worker's."""
        return self._links[worker_id].peer_memory

    def is_clogged(self, worker_id: str, link_class: LinkClass) -> bool:
        """True while nothing of a bulk class may be sent to a member: there is no room for it."""
        has_room = self._links[worker_id].channel.has_room(link_class)
        return bool(self._bulk[worker_id, link_class]) or not has_room

    @property
    def has_backlog(self) -> bool:
        """True while some link has no room for KV or weights; nobody tells when it has again."""
        return any(self.is_clogged(*each) for each in self._bulk)

    def push_bulk(self) -> None:
        """Give the links as much of what is queued as they take."""
        for (worker_id, link_class), frames in self._bulk.items():
            try:
                while frames and self._links[worker_id].send(frames[0], link_class):
                    frames.popleft()
            except LinkDownError:
                frames.clear()

    def close(self) -> None:
        """Close the links; the others notice."""
        for link in self._links.values():
            link.close()

    def _frame(self, kind: FrameKind, message: Message, packed: Packed) -> LinkFrame:
        return LinkFrame(
            kind, self.key.group_id, self.key.epoch, header=message.encode(), buffers=packed
        )
