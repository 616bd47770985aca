"""What all links of a worker have carried together, those that are gone included.

Made for the worker's metrics: links come and go with every change of the layout, counters only
rise.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from services.worker.links.base import Link, LinkClass


class Direction(StrEnum):
    """Seen from this worker."""

    SENT = "sent"
    RECEIVED = "received"


class LinkTotals(Collector):
    """Sums over links. `add` and `collect` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self._gone: Counter[tuple[LinkClass, Direction]] = Counter()

    def add(self, link: Link) -> None:
        """Count a new link, too."""
        with self._lock:
            self._fold()
            self._links.append(link)

    def collect(self) -> Iterator[Metric]:
        """One counter of payload bytes by class and direction."""
        with self._lock:
            self._fold()
            totals = sum(map(_carried, self._links), self._gone)
        family = CounterMetricFamily(
            "kunserve_link_bytes",
            "payload that links to other workers carried",
            labels=["class", "direction"],
        )
        for link_class in LinkClass:
            for direction in Direction:
                labels = [link_class.name.lower(), direction.value]
                family.add_metric(labels, float(totals[link_class, direction]))
        yield family

    def _fold(self) -> None:
        """Keep of links that are down what they have carried, and nothing else."""
        for link in [link for link in self._links if not link.is_up]:
            self._gone += _carried(link)
            self._links.remove(link)


def _carried(link: Link) -> Counter[tuple[LinkClass, Direction]]:
    carried: Counter[tuple[LinkClass, Direction]] = Counter()
    for link_class, stats in link.stats().classes.items():
        carried[link_class, Direction.SENT] = stats.bytes_sent
        carried[link_class, Direction.RECEIVED] = stats.bytes_received
    return carried
