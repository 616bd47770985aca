"""The bus on a NATS server, through nats-py with the defaults that do not fit overridden.

What differs from nats-py's own behaviour: it reconnects for ever, sees a dead link after 30 s,
fails what is in flight at once when the link drops instead of after its timeout, never prints a
traceback of its own, and its key-value buckets and watches outlive a server that lost its store
(`shared/bus/nats_kv.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import SplitResult

import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription

from shared.bus.base import (
    BusDisconnectedError,
    BusMessage,
    BusStats,
    BusTimeoutError,
    MessageHandler,
    NoRespondersError,
    ReconnectHandler,
    Subscription,
)
from shared.bus.nats_faults import forward_client_log, translate
from shared.bus.nats_kv import BucketConfig, NatsKeyValue
from shared.bus.nats_login import Credentials, login_options, parse_url
from shared.bus.watch import WatchFeed
from shared.errors import ConfigError

__all__ = ["Credentials", "NatsBus", "NatsSubscription", "connect"]

PING_INTERVAL_SECONDS = 10
MAX_OUTSTANDING_PINGS = 2
RECONNECT_WAIT_SECONDS = (0.25, 1.0)
PENDING_BYTES = 8 * 1024 * 1024
FLUSH_TIMEOUT_SECONDS = 5.0
DRAIN_TIMEOUT_SECONDS = 5
JETSTREAM_TIMEOUT_SECONDS = 2.0
GIVE_UP_ATTEMPTS = 5
HEADER_STATUS, STATUS_NO_RESPONDERS = "Status", "503"
HEADER_SUBJECT = "Nats-Subject"

Result = TypeVar("Result")


async def connect(
    url: str,
    *,
    service: str,
    instance: str,
    credentials: Credentials | None = None,
    connect_timeout_seconds: float = 10.0,
) -> NatsBus:
    """Connect to the NATS server at `url`, trying again until the timeout.

    Args:
        url: `nats://[user:password@|token@]host[:port]`, or `tls://...`.
        service, instance: name the connection on the server; the inbox prefix is
            `_INBOX_<service>.<instance>`, so permissions can keep services' replies apart.

    Raises:
        ConfigError: no server there, or it does not let us in; one sentence.
    """
    credentials = credentials or Credentials()
    credentials.check()
    bus = NatsBus(service, instance)
    await bus.open(parse_url(url), credentials, connect_timeout_seconds)
    return bus


class NatsBus:
    """One connection to a NATS server. Made by `connect`."""

    def __init__(self, service: str, instance: str) -> None:
        self._service, self._instance = service, instance
        self._client = Client()
        self._jetstream = self._client.jetstream(timeout=JETSTREAM_TIMEOUT_SECONDS)
        self._log = structlog.get_logger(component="bus", service=service, instance=instance)
        self.stats = BusStats()
        self.feeds: set[WatchFeed] = set()
        self._refusal: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last_error = ""
        self._is_open = False
        self._closing = False
        self._closed = asyncio.Event()
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reconnect_handlers: list[ReconnectHandler] = []

    async def open(
        self, url: SplitResult, credentials: Credentials, connect_timeout_seconds: float
    ) -> None:
        """Connect; see `connect`."""
        forward_client_log()
        where = url.netloc.rpartition("@")[2]
        connecting = asyncio.ensure_future(self._client.connect(**self._options(url, credentials)))
        outcomes: set[asyncio.Future[Any]] = {connecting, self._refusal}
        try:
            await asyncio.wait(
                outcomes, timeout=connect_timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        except asyncio.CancelledError:
            await self._give_up(connecting)
            raise
        if not connecting.done():
            await self._give_up(connecting)
            if self._refusal.done():
                reason = self._refusal.result()
                raise ConfigError(f"NATS at {where} refused the credentials ({reason})")
            reason = self._last_error or "no answer"
            raise ConfigError(
                f"cannot reach NATS at {where} within {connect_timeout_seconds:g} s ({reason})"
            )
        if failure := connecting.exception():
            raise ConfigError(f"cannot connect to NATS at {where}: {failure}") from failure
        self._is_open = True
        self._log.info("bus.connected", server=where)

    async def _give_up(self, connecting: asyncio.Future[None]) -> None:
        self._closing = True
        for _ in range(GIVE_UP_ATTEMPTS):  # nats-py swallows a cancellation here and there
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=0.5)
            if connecting.done():
                break
        await self._client.close()

    def _options(self, url: SplitResult, credentials: Credentials) -> dict[str, Any]:
        options: dict[str, Any] = {
            "servers": [f"{url.scheme}://{url.netloc.rpartition('@')[2]}"],
            "name": f"{self._service}-{self._instance}",
            "inbox_prefix": f"_INBOX_{self._service}.{self._instance}",
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
            "connect_timeout": 5,
            "reconnect_time_wait": random.uniform(*RECONNECT_WAIT_SECONDS),
            "max_reconnect_attempts": -1,
            "ping_interval": PING_INTERVAL_SECONDS,
            "max_outstanding_pings": MAX_OUTSTANDING_PINGS,
            "drain_timeout": DRAIN_TIMEOUT_SECONDS,
            "flush_timeout": FLUSH_TIMEOUT_SECONDS,
            "pending_size": PENDING_BYTES,
        }
        return options | login_options(url, credentials)

    # --- what nats-py tells us -------------------------------------------------------------------

    async def _on_error(self, error: Exception) -> None:
        text = str(error).removeprefix("nats: ").strip("'") or type(error).__name__
        self.stats.errors += 1
        if isinstance(error, nats.errors.SlowConsumerError):
            self.stats.slow_consumers += 1
            self._log.warning("bus.slow_consumer", subject=error.subject)
        elif self._is_open and text != self._last_error:
            self._log.warning("bus.error", error=text)
        self._last_error = text
        refused = "authorization" in text.lower() or "authentication" in text.lower()
        if refused and not self._refusal.done():
            self._refusal.set_result(text)

    async def _on_disconnected(self) -> None:
        if not self._closing:
            self.stats.disconnects += 1
            self._log.warning("bus.disconnected", error=self._last_error)
        for operation in list(self._in_flight):
            operation.cancel()

    async def _on_reconnected(self) -> None:
        self.stats.reconnects += 1
        self._last_error = ""
        self._log.info("bus.reconnected")
        for feed in self.feeds:
            feed.resync()
        for handler in self._reconnect_handlers:
            task = asyncio.ensure_future(self._run_reconnect_handler(handler))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _on_closed(self) -> None:
        if not self._closing:
            self._log.error("bus.closed", error=str(self._client.last_error or self._last_error))
        self._closed.set()

    async def _run_reconnect_handler(self, handler: ReconnectHandler) -> None:
        try:
            await handler()
        except Exception:
            self.stats.handler_errors += 1
            self._log.exception("bus.reconnect_handler_failed")

    # --- the Bus ---------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return bool(self._client.is_connected) and not self._closed.is_set()

    @property
    def max_payload_bytes(self) -> int:
        return int(self._client.max_payload)

    async def publish(self, subject: str, payload: bytes, *, reply: str = "") -> None:
        try:
            await self._client.publish(subject, payload, reply=reply)
        except nats.errors.Error as error:
            raise translate(error, subject, len(payload)) from error

    async def request(self, subject: str, payload: bytes, *, timeout_seconds: float) -> bytes:
        answer: Msg = await self.while_connected(
            self._client.request(subject, payload, timeout=timeout_seconds),
            subject,
            timeout_seconds,
            len(payload),
        )
        return bytes(answer.data)

    async def while_connected(
        self,
        operation: Coroutine[Any, Any, Result],
        subject: str,
        timeout_seconds: float,
        payload_bytes: int = 0,
    ) -> Result:
        """Await `operation`, but no longer than the timeout or than the connection holds.

        Raises a BusError for what nats-py reports; JetStream's errors pass unchanged.
        """
        if not self.is_connected:
            operation.close()
            raise BusDisconnectedError(f"no connection to NATS for {subject}")
        task = asyncio.ensure_future(operation)
        self._in_flight.add(task)
        try:
            await asyncio.wait({task}, timeout=timeout_seconds + 1.0)
        finally:
            self._in_flight.discard(task)
            running = not task.done()
            task.cancel()
        if running:
            raise BusTimeoutError(f"no answer on {subject} within {timeout_seconds:g} s")
        if task.cancelled():
            raise BusDisconnectedError(f"the connection to NATS went down ({subject})")
        try:
            return task.result()
        except nats.js.errors.Error:
            raise
        except nats.errors.Error as error:
            raise translate(error, subject, payload_bytes) from error

    async def subscribe(
        self, subject: str, handler: MessageHandler, *, queue: str = ""
    ) -> Subscription:
        async def deliver(message: Msg) -> None:
            await handler(BusMessage(message.subject, message.data, message.reply))

        return await self.subscribe_raw(subject, deliver, queue)

    async def subscribe_no_responders(self, handler: Callable[[str], Awaitable[None]]) -> str:
        async def deliver(message: Msg) -> None:
            headers = message.headers or {}
            if headers.get(HEADER_STATUS) == STATUS_NO_RESPONDERS and HEADER_SUBJECT in headers:
                await handler(headers[HEADER_SUBJECT])

        inbox = str(self._client.new_inbox())
        await self.subscribe_raw(inbox, deliver)
        return inbox

    async def subscribe_raw(
        self, subject: str, deliver: Callable[[Msg], Awaitable[None]], queue: str = ""
    ) -> NatsSubscription:
        """Subscribe with nats-py's own messages (headers included)."""

        async def guarded(message: Msg) -> None:
            try:
                await deliver(message)
            except Exception:
                self.stats.handler_errors += 1
                self._log.exception("bus.handler_failed", subject=message.subject)

        try:
            subscription = await self._client.subscribe(subject, queue=queue, cb=guarded)
        except nats.errors.Error as error:
            raise translate(error, subject) from error
        try:
            await self.flush(timeout_seconds=FLUSH_TIMEOUT_SECONDS)
        except (BusDisconnectedError, BusTimeoutError) as error:
            # nats-py subscribes again when it reconnects.
            self._log.debug("bus.subscribed_while_disconnected", subject=subject, error=str(error))
        return NatsSubscription(subscription)

    async def key_value(
        self, bucket: str, *, ttl_seconds: float | None = None, history: int = 1
    ) -> NatsKeyValue:
        store = NatsKeyValue(self, self._jetstream, BucketConfig(bucket, ttl_seconds, history))
        await store.open()
        return store

    def on_reconnect(self, handler: ReconnectHandler) -> None:
        self._reconnect_handlers.append(handler)

    async def flush(self, *, timeout_seconds: float) -> None:
        # A request nobody listens to is answered by the server itself, after everything before it.
        # (nats-py's own flush kills its read loop when the answer comes after the timeout.)
        echo = f"{self._client.new_inbox()}.flush"
        try:
            await self.request(echo, b"", timeout_seconds=timeout_seconds)
        except NoRespondersError:
            return

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(2 * DRAIN_TIMEOUT_SECONDS):
                await self._client.drain()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            self._log.debug("bus.drain_failed", error=str(error))
            await self._client.close()
        self._closed.set()


class NatsSubscription:
    """A subscription of nats-py."""

    def __init__(self, subscription: ClientSubscription) -> None:
        self._subscription = subscription
        self._active = True

    async def unsubscribe(self) -> None:
        """Stop delivery. Idempotent; nothing to do once the connection is closed."""
        if not self._active:
            return
        self._active = False
        try:
            await self._subscription.unsubscribe()
        except (nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError):
            return
