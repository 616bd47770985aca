"""How a service gets on the bus that its settings name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.bus.base import Bus
from shared.bus.nats import Credentials, connect
from shared.lifecycle import unless_stopped
from shared.service_settings import ServiceSettings


@asynccontextmanager
async def service_bus(
    settings: ServiceSettings, service: str, instance: str, stop: asyncio.Event
) -> AsyncIterator[Bus | None]:
    """The bus of `instance` of a service, closed at the end; None if `stop` is set before it is up.

    Raises:
        ConfigError: no server there, or it does not let us in; one sentence.
    """
    credentials = Credentials(settings.nats_creds, settings.nats_nkey)
    bus = await unless_stopped(
        stop, connect(settings.nats, service=service, instance=instance, credentials=credentials)
    )
    try:
        yield bus
    finally:
        if bus is not None:
            await bus.close()
