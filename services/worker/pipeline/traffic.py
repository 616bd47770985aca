"""What travels between the members of a group beside batches: KV and weights. Engine thread."""

from __future__ import annotations

from services.worker.model.runner import ModelRunner
from services.worker.pipeline.kv_courier import KvCourier, TableLookup
from services.worker.pipeline.peers import GroupPeers
from services.worker.pipeline.weight_courier import WeightCourier


class BulkTraffic:
    """One member's part of it, from its commit on.

    Attributes:
        kv: KV of running requests, as the leader orders.
        weights: layers that a member loads and another one has.
    """

    def __init__(self, peers: GroupPeers, runner: ModelRunner, lookup: TableLookup) -> None:
        self.kv = KvCourier(peers, runner, lookup)
        self.weights = WeightCourier(peers, runner)
        self._peers = peers

    def pump(self) -> None:
        """Send for as long as it may take now, and as long as the links take it."""
        self.kv.pump()
        self.weights.pump()
        self._peers.push_bulk()

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to do whatever arrives."""
        return self._peers.has_backlog or self.kv.is_busy or self.weights.is_busy
