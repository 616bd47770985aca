"""Token frames on their way to the routers: one frame per router for all that a round brought.

A frame is published with a reply subject; where the router is gone, the server says so at once and
the worker drops everything it runs for that router.
"""

from __future__ import annotations

import structlog

from services.worker.member_state import Placement
from shared.bus.base import Bus, BusError
from shared.messages import TokenFrame, TokenItem
from shared.subjects import Subjects


class TokenPublisher:
    """Sends items to the routers that wait for them."""

    def __init__(
        self, bus: Bus, subjects: Subjects, worker_id: str, placement: Placement, reply: str
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._worker_id = worker_id
        self._placement = placement
        self._reply = reply
        self._step = 0
        self._log = structlog.get_logger(component="tokens")

    async def send(self, by_router: dict[str, list[TokenItem]]) -> None:
        """Publish one frame per router.

        A frame that cannot be sent is lost; the router notices the gap and asks for it (`Resume`).
        """
        self._step += 1
        for router_id, items in by_router.items():
            await self._publish(router_id, tuple(items))

    async def _publish(self, router_id: str, items: tuple[TokenItem, ...]) -> None:
        frame = TokenFrame(
            worker_id=self._worker_id,
            group_id=self._placement.group_id,
            epoch=self._placement.epoch,
            step=self._step,
            items=items,
        )
        try:
            await self._bus.publish(
                self._subjects.tokens(router_id), frame.encode(), reply=self._reply
            )
        except BusError as error:
            self._log.warning("token frame lost", router=router_id, reason=str(error))
