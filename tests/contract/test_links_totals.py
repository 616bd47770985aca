"""What links have carried is counted for good, also when they are gone."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from services.worker.links.base import LinkClass, LinkFrame, Transport
from services.worker.links.config import LinkConfig
from services.worker.links.totals import LinkTotals
from tests.conftest import eventually
from tests.link_peer import Kind, linked_here


def carried(registry: CollectorRegistry, link_class: str, direction: str) -> float:
    labels = {"class": link_class, "direction": direction}
    value = registry.get_sample_value("kunserve_link_bytes_total", labels)
    assert value is not None
    return value


async def test_bytes_of_links_that_are_gone_stay_counted() -> None:
    totals, registry = LinkTotals(), CollectorRegistry()
    registry.register(totals)
    for number in (1, 2):
        with linked_here(Transport.TCP, LinkConfig()) as linked:
            totals.add(linked.link)
            echo = bytes([LinkClass.EXCHANGE])
            frame = LinkFrame(Kind.ECHO, "g0", 1, echo, [bytes(1000 * number)])
            linked.link.send(frame, LinkClass.CONTROL)
            await eventually(linked.inbox.has_frames)
        assert linked.link.is_up is False
    assert 3000 < carried(registry, "control", "sent") < 4000
    assert 3000 < carried(registry, "exchange", "received") < 4000
    assert carried(registry, "exchange", "sent") == carried(registry, "restore", "sent") == 0
