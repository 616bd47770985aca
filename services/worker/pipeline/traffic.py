"""What travels between the members of a group beside batches: KV and weights. Engine thread."""

from __future__ import annotations

from collections.abc import Callable

from services.worker.engine.request import KvKey
from services.worker.links.base import LinkFrame
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.kv_courier import KvCourier, TableLookup
from services.worker.pipeline.messages import FrameKind, KvPart, KvTaken
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.weight_courier import WeightCourier


class BulkTraffic:
    """One member's part of it, from its commit on.

    Attributes:
        kv: KV of running requests, as the leader orders.
        weights: layers that a member loads and another one has.
    """

    def __init__(
        self,
        peers: GroupPeers,
        runner: ModelRunner,
        lookup: TableLookup,
        on_filled: Callable[[KvKey], None],
    ) -> None:
        self.kv = KvCourier(peers, runner, lookup, on_filled)
        self.weights = WeightCourier(peers, runner)
        self._peers = peers

    def handle(self, frame: LinkFrame) -> None:
        """Take note of a frame of another member.

        Raises:
            MessageError: it cannot be read.
            ValueError: it is of no kind that travels here.
        """
        match frame.kind:
            case FrameKind.KV_PART:
                self.kv.take(KvPart.decode(frame.header), frame.buffers)
            case FrameKind.KV_TAKEN:
                self.kv.taken(KvTaken.decode(frame.header))
            case FrameKind.WEIGHTS_REQUEST | FrameKind.WEIGHTS:
                self.weights.handle(frame)
            case _:
                raise ValueError(f"a member has no use for a frame of kind {frame.kind}")

    def pump(self) -> None:
        """Move bytes for as long as it may take now, and as long as the links take it."""
        self.kv.pump()
        self.weights.pump()
        self._peers.push_bulk()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        return self._peers.has_backlog or self.kv.is_busy or self.weights.is_busy
