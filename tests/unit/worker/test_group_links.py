"""Which links a member of a group opens, and for what."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

import pytest

from services.worker.group_links import GroupLinks
from services.worker.links.base import LinkPeer
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.link import StreamLink
from shared.layout import GroupPlan, MemberPlan, Span


class Endpoint:
    """Notes what is opened."""

    def __init__(self) -> None:
        self.opened: dict[str, int] = {}

    async def open(
        self, peer: LinkPeer, *, num_activations: int, timeout_seconds: float
    ) -> StreamLink:
        self.opened[peer.worker_id] = num_activations
        return cast(StreamLink, Closable())


class Closable:
    def close(self) -> None:
        """A link that nobody waits for any more."""


@pytest.mark.parametrize(
    ("worker_id", "expected"),
    [("a", {"b": 3, "c": 0}), ("b", {"c": 3}), ("c", {})],
)
async def test_activations_go_to_the_next_stage_alone(
    worker_id: str, expected: dict[str, int]
) -> None:
    """As many may be on their way as there are stages."""
    spans = {"a": Span(start=0, end=2), "b": Span(start=2, end=4), "c": Span(start=4, end=6)}
    members = tuple(MemberPlan(worker_id=name, span=span) for name, span in spans.items())
    group, endpoint = GroupPlan(group_id="p", epoch=1, members=members), Endpoint()
    with suppress(TimeoutError):  # nobody opens the links of the stages before
        await GroupLinks(worker_id).connect(cast(LinkEndpoint, endpoint), group, 1, 0.05)
    assert endpoint.opened == expected
