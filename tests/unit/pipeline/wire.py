"""A link between two members in tests of what they send each other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.worker.channels.base import TensorChannel
from services.worker.links.base import LinkClass, LinkFrame, PeerMemory


@dataclass
class Wire:
    """A link that keeps what is sent until it is delivered."""

    peer_memory: PeerMemory | None
    channel: TensorChannel
    sent: deque[LinkFrame] = field(default_factory=deque)
    is_up: bool = True

    def send(self, frame: LinkFrame, link_class: LinkClass) -> bool:
        self.sent.append(frame)
        return True
