"""A worker's life in groups, on the event loop: plans in, answers out, links, streams that move.

plan bucket --> LayoutFollower --> Transition --commands--> engine thread
acks bucket <-- LayoutFollower <-- Transition <--events---- engine thread
other workers' links --> LinkEndpoint --frames--> engine thread
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import assert_never

import structlog

from services.worker.engine_thread import EngineThread, FrameReceived, LinkDown
from services.worker.layout_follower import LayoutFollower
from services.worker.links.base import Transport
from services.worker.links.config import LinkConfig
from services.worker.links.context import EndpointAddress, LinkContext, LinkHandlers
from services.worker.links.endpoint import LinkEndpoint
from services.worker.links.host import host_id
from services.worker.links.totals import LinkTotals
from services.worker.member_state import Placement
from services.worker.outbound import TokenPublisher
from services.worker.pipeline.events import (
    Adopted,
    Broken,
    Committed,
    FormerLost,
    GroupEvent,
    HandedOver,
    PhaseTimed,
    Prepared,
    PrepareFailed,
    Settled,
    Whole,
)
from services.worker.pipeline.handover import pack_request
from services.worker.pipeline.messages import FrameKind, HandOver, RequestMessage
from services.worker.pipeline.peers import GroupKey
from services.worker.settings import WorkerSettings
from services.worker.streams import StreamTable
from services.worker.transition import Transition
from shared.buckets import open_acks, open_plan
from shared.bus.base import Bus
from shared.layout import GroupPlan
from shared.subjects import Subjects


class GroupService:
    """Built and started once; `run` is a task of the worker's service."""

    def __init__(
        self,
        settings: WorkerSettings,
        bus: Bus,
        engine: EngineThread,
        streams: StreamTable,
        publisher: TokenPublisher,
        placement: Placement,
        link_totals: LinkTotals,
        *,
        on_change: Callable[[], None],
    ) -> None:
        """Take the worker's parts.

        Args:
            on_change: the placement changed.
        """
        self._settings = settings
        self._bus = bus
        self._subjects = Subjects(settings.deployment)
        self._streams = streams
        self._publisher = publisher
        self._placement = placement
        self._link_totals = link_totals
        self._engine = engine
        self._on_change = on_change
        self._transition = Transition(settings.worker_id, placement, engine, self._on_transition)
        self._endpoint = LinkEndpoint(self._link_context())
        self._log = structlog.get_logger(component="groups")

    async def start(self) -> None:
        """Take links, and get ready to follow the plan. Raises ConfigError, LinkError, BusError."""
        self._follower = LayoutFollower(
            self._settings.worker_id,
            self._placement,
            self._transition,
            plans=await open_plan(self._bus, self._subjects),
            acks=await open_acks(self._bus, self._subjects),
        )
        self._bus.on_reconnect(self._on_reconnect)
        await self._endpoint.start()
        self._transition.start(self._endpoint)

    async def run(self) -> None:
        """Follow the plan for ever."""
        await self._follower.run()

    async def close(self) -> None:
        """Take part in nothing new. Links that the engine has are closed by it."""
        await self._transition.close()
        await self._endpoint.close()

    # --- what the worker asks --------------------------------------------------------------------

    @property
    def is_reloading(self) -> bool:
        """True while layers are missing that no plan has had given up."""
        return self._transition.is_reloading

    @property
    def needed_in(self) -> GroupPlan | None:
        """The pipeline whose members need this worker's layers."""
        return self._transition.needed_in

    def drain(self) -> None:
        """Join no pipeline any more."""
        self._transition.drain()

    # --- what the engine says --------------------------------------------------------------------

    async def handle(self, event: GroupEvent) -> None:
        """Act on what happened in the engine thread."""
        match event:
            case Prepared(epoch):
                self._transition.prepared(epoch)
            case PrepareFailed(epoch, reason):
                self._transition.prepare_failed(epoch, reason)
            case Committed(epoch):
                self._transition.applied(epoch)
            case Settled(epoch):
                self._transition.settled(epoch)
            case HandedOver():
                self._hand_over(event)
            case Adopted(requests):
                for request in requests:
                    self._streams.adopt(
                        request.request_id, request.attempt, request.router_id, request.items
                    )
            case Broken(keys, reason):
                self._transition.broken(reason)
                for key in keys:
                    await self._lose_moved(key)
            case Whole():
                self._transition.whole()
            case FormerLost(key):
                await self._lose_moved(key)
            case PhaseTimed(phase, seconds, num_bytes):
                self._log.info(
                    "phase over",
                    phase=phase.value,
                    milliseconds=round(seconds * 1e3, 3),
                    bytes=num_bytes,
                )
            case _:
                assert_never(event)

    def _hand_over(self, event: HandedOver) -> None:
        """Send the heir its requests, with what was said of them; some are wanted no more."""
        now, heir = time.monotonic(), event.heir
        requests: list[RequestMessage] = []
        for request in event.requests:
            items = self._streams.move(
                request.request_id, request.attempt, heir, event.peers.key, now
            )
            requests.append(pack_request(request, items, now))
        message = HandOver(
            worker_id=self._settings.worker_id,
            num_blocks=event.num_blocks,
            requests=tuple(requests),
        )
        event.peers.send(heir, FrameKind.HAND_OVER, message)
        self._log.info("requests handed over", heir=heir, requests=len(requests))

    async def _lose_moved(self, key: GroupKey) -> None:
        """Have the requests replayed that this worker gave to another member of a broken group."""
        await self._publisher.send(self._streams.lose_moved(key, time.monotonic()))

    async def _on_reconnect(self) -> None:
        self._follower.wake()  # the server may have lost what was said

    def _on_transition(self) -> None:
        self._follower.wake()
        self._on_change()

    # --- links -----------------------------------------------------------------------------------

    def _link_context(self) -> LinkContext:
        settings, engine, transition = self._settings, self._engine, self._transition
        transports = tuple(Transport) if settings.link_shared_memory else (Transport.TCP,)
        is_limited = settings.link_bandwidth is not None
        return LinkContext(
            worker_id=settings.worker_id,
            bus=self._bus,
            subjects=self._subjects,
            address=EndpointAddress(
                settings.link_host,
                settings.link_advertise,
                host_id(),
                transports,
                None if is_limited else engine.memory_file,  # what is read costs no bandwidth
            ),
            config=LinkConfig(bandwidth_bytes_per_second=settings.link_bandwidth),
            handlers=LinkHandlers(
                on_link=transition.links.on_link,
                on_frame=lambda link, frame: engine.submit(FrameReceived(frame)),
                on_down=lambda link, reason: engine.submit(LinkDown(link, reason)),
            ),
            channels=engine.channels,
            current=lambda: transition.committed,
            totals=self._link_totals,
        )
