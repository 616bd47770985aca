"""Links to the other members of groups: opened and accepted on the event loop.

Of two members, the one of the earlier stage opens the link and the other one accepts it. A link
that was accepted waits here until this worker has read the plan that it belongs to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from services.worker.links.base import Link, LinkPeer
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.link import StreamLink
from services.worker.pipeline.peers import GroupKey
from shared.layout import GroupPlan


class GroupLinks:
    """All links of a worker that no group has taken yet, and the way to get them."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._accepted: dict[tuple[GroupKey, str], StreamLink] = {}
        self._news = asyncio.Event()

    def on_link(self, link: StreamLink) -> None:
        """Keep a link that a member of some group has opened."""
        peer = link.peer
        slot = (GroupKey(peer.group_id, peer.epoch), peer.worker_id)
        before = self._accepted.pop(slot, None)
        if before is not None:
            before.close()
        self._accepted[slot] = link
        self._news.set()

    async def connect(
        self, endpoint: LinkEndpoint, group: GroupPlan, term: int, timeout_seconds: float
    ) -> Mapping[str, Link]:
        """Links to all other members of `group`; they belong to the caller.

        Raises:
            LinkError: a member cannot be reached.
            TimeoutError: a member did not open its link in time.
        """
        key = GroupKey(group.group_id, group.epoch)
        worker_ids = [member.worker_id for member in group.members]
        position = worker_ids.index(self._worker_id)
        links: dict[str, StreamLink] = {}
        try:
            async with asyncio.timeout(timeout_seconds):
                for worker_id in worker_ids[position + 1 :]:
                    is_next = worker_id == worker_ids[position + 1]
                    links[worker_id] = await endpoint.open(
                        LinkPeer(worker_id, key.group_id, term, key.epoch),
                        num_activations=len(worker_ids) if is_next else 0,  # one for each stage
                        timeout_seconds=timeout_seconds,
                    )
                for worker_id in worker_ids[:position]:
                    links[worker_id] = await self._take(key, worker_id)
        except BaseException:
            for link in links.values():
                link.close()
            raise
        return links

    def discard(self, newest_epoch: int | None = None) -> None:
        """Close what waits for groups of `newest_epoch` and before; without it, all."""
        for slot in list(self._accepted):
            if newest_epoch is None or slot[0].epoch <= newest_epoch:
                self._accepted.pop(slot).close()

    async def _take(self, key: GroupKey, worker_id: str) -> StreamLink:
        while (key, worker_id) not in self._accepted:
            self._news.clear()
            await self._news.wait()
        return self._accepted.pop((key, worker_id))
