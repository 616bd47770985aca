"""What all links of a worker have carried together, those that are gone included; and what is up.

Made for the worker's metrics: links come and go with every change of the layout, counters only
rise.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.channels.base import ChannelKind, Direction
from services.worker.links.base import Link, LinkClass


@dataclass(slots=True)
class _Carried:
    """Bytes, by what they were and by what carried them."""

    payload: Counter[tuple[LinkClass, Direction]] = field(default_factory=Counter)
    tensors: Counter[tuple[ChannelKind, Direction]] = field(default_factory=Counter)

    def add(self, link: Link) -> None:
        stats = link.stats()
        for link_class, each in stats.classes.items():
            self.payload[link_class, Direction.SENT] += each.bytes_sent
            self.payload[link_class, Direction.RECEIVED] += each.bytes_received
        self.tensors.update(stats.tensors)


class LinkTotals(Collector):
    """Sums over links. `add` and `collect` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self._gone = _Carried()

    def add(self, link: Link) -> None:
        """Count a new link, too."""
        with self._lock:
            self._fold()
            self._links.append(link)

    def collect(self) -> Iterator[Metric]:
        """Payload by class, tensors by channel, and what links there are."""
        with self._lock:
            self._fold()
            links = list(self._links)
            total = _Carried(self._gone.payload.copy(), self._gone.tensors.copy())
        for link in links:
            total.add(link)
        payload = CounterMetricFamily(
            "kunserve_link_bytes",
            "payload that links to other workers carried",
            labels=["class", "direction"],
        )
        tensors = CounterMetricFamily(
            "kunserve_tensor_bytes",
            "tensors that went to and came from other workers, by what carried them",
            labels=["channel", "direction"],
        )
        for direction in Direction:
            for link_class in LinkClass:
                labels = [link_class.name.lower(), direction.value]
                payload.add_metric(labels, float(total.payload[link_class, direction]))
            for kind in ChannelKind:
                labels = [kind.value, direction.value]
                tensors.add_metric(labels, float(total.tensors[kind, direction]))
        yield payload
        yield tensors
        yield _links_up(links)

    def _fold(self) -> None:
        """Keep of links that are down what they have carried, and nothing else."""
        for link in [link for link in self._links if not link.is_up]:
            self._gone.add(link)
            self._links.remove(link)


def _links_up(links: list[Link]) -> Metric:
    """How many there are of each kind; the fallback says why it is nothing faster."""
    kinds: Counter[tuple[str, str, str, str]] = Counter()
    for link in links:
        stats = link.stats()
        channel = "" if stats.channel is None else stats.channel.value
        labels = (link.peer.worker_id, stats.transport.value, channel, stats.channel_fallback)
        kinds[labels] += 1
    family = GaugeMetricFamily(
        "kunserve_links_up",
        "links to other workers",
        labels=["peer", "transport", "channel", "channel_fallback"],
    )
    for labels, count in kinds.items():
        family.add_metric(labels, float(count))
    return family
