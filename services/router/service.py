"""The router process: puts the parts together, listens, drains.

    HTTP --> app --> Generator --> Dispatcher --gen--> bus
    bus --tok--> TokenInbox --> Generator          Watchdog looks at all of it
    bus --load, plan, members--> Observer --> Fleet

Without a planner the last plan stays in force; without the bus running streams wait for it to
come back and new requests wait in the queue.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import structlog
from aiohttp import web

from services.router.api.context import ApiContext, DrainState, ServedModel
from services.router.app import create_app
from services.router.dispatcher import Dispatcher, DispatchLimits
from services.router.fleet import Fleet
from services.router.generator import Generator
from services.router.link import WorkerLink
from services.router.metrics import RouterMetrics
from services.router.observer import Observer
from services.router.queue import WaitingQueue
from services.router.queue_reporter import QueueReporter
from services.router.settings import GenerationDefaults, RouterSettings
from services.router.token_inbox import TokenInbox
from services.router.tokenizer import ModelTokenizer, load_tokenizer
from services.router.watchdog import Watchdog
from shared.buckets import open_members, open_plan
from shared.bus.base import Bus, KeyValue
from shared.cache_dir import default_cache_dir
from shared.errors import ConfigError
from shared.lifecycle import BackgroundTasks, fail_when_closed, stop_on_signals
from shared.logging import configure_logging
from shared.membership import Lease, MemberView
from shared.messages import RouterInfo
from shared.metrics import BusCollector, new_registry
from shared.models import resolve_tokenizer
from shared.service_bus import service_bus
from shared.subjects import Subjects, router_key

#: Time open connections get to close after the last answer.
_HTTP_SHUTDOWN_SECONDS = 1.0


async def run(settings: RouterSettings) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs.

    Raises:
        ConfigError: the settings cannot work (model, port, NATS).
    """
    configure_logging("router", settings.router_id, settings.log_format, settings.log_level)
    stop = stop_on_signals()
    cache_dir = settings.cache_dir or default_cache_dir(os.environ)
    directory = await asyncio.to_thread(resolve_tokenizer, settings.model, cache_dir)
    tokenizer = load_tokenizer(directory)
    # Vocabulary and modules live for ever: a full collection need not walk them under load.
    gc.collect()
    gc.freeze()
    async with service_bus(settings, "router", settings.router_id, stop) as bus:
        if bus is not None:
            await RouterService(settings, bus, tokenizer).run(stop)


def served_name(settings: RouterSettings) -> str:
    """The model's name in the API: as set, or the last part of where it comes from."""
    if settings.served_model_name is not None:
        return settings.served_model_name
    if settings.model.startswith("builtin:"):
        return settings.model.partition(":")[2]
    path = Path(settings.model).expanduser().resolve()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


@dataclass(frozen=True)
class _Parts:
    """What a router is made of."""

    context: ApiContext
    watchdog: Watchdog
    observer: Observer
    inbox: TokenInbox
    queue: WaitingQueue
    queue_reporter: QueueReporter


class RouterService:
    """One router on a connected bus; `url` is where it listens once `run` is under way."""

    def __init__(self, settings: RouterSettings, bus: Bus, tokenizer: ModelTokenizer) -> None:
        self._settings = settings
        self._bus = bus
        self._subjects = Subjects(settings.deployment)
        self._parts = self._assemble(tokenizer)
        self.context = self._parts.context
        self._log = structlog.get_logger(component="router")
        self.url = ""
        self.listening = asyncio.Event()

    @property
    def num_queued(self) -> int:
        """Requests that wait for a worker."""
        return len(self._parts.queue)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain."""
        settings, parts = self._settings, self._parts
        members = await open_members(self._bus, self._subjects, settings.lease_ttl_seconds)
        plans = await open_plan(self._bus, self._subjects)
        view = MemberView(self._bus, members, settings.lease_ttl_seconds)
        view.subscribe(parts.observer.on_member)
        self._bus.on_reconnect(parts.watchdog.on_reconnect)
        await self._bus.subscribe(self._subjects.tokens(settings.router_id), parts.inbox.on_frame)
        await self._bus.subscribe(self._subjects.all_loads, parts.observer.on_load)
        runner = await self._listen()
        lease = self._lease(members)
        try:
            async with BackgroundTasks() as tasks:
                tasks.spawn(fail_when_closed(self._bus), "bus closed")
                tasks.spawn(lease.run(), "lease")
                tasks.spawn(view.run(), "members")
                tasks.spawn(parts.observer.watch_plan(plans), "plan")
                tasks.spawn(parts.watchdog.run(), "watchdog")
                tasks.spawn(parts.queue_reporter.run(), "queue")
                self._log.info("router.listening", url=self.url, model=parts.context.model.name)
                self.listening.set()
                await tasks.run_until(stop)
                await self._drain()
                # Handlers that still run are cancelled here, while the bus can carry a Cancel.
                await runner.cleanup()
                await lease.release()
        finally:
            await runner.cleanup()

    # --- assembly --------------------------------------------------------------------------------

    def _assemble(self, tokenizer: ModelTokenizer) -> _Parts:
        settings, bus = self._settings, self._bus
        model = self._served_model(tokenizer)
        registry = new_registry()
        registry.register(BusCollector(bus))
        metrics = RouterMetrics(registry, model.name)
        fleet = Fleet(settings.router_id)
        queue = WaitingQueue(settings.max_queued_requests, settings.max_queued_tokens)
        link = WorkerLink(
            bus, self._subjects, settings.router_id, settings.dispatch_timeout_seconds
        )
        limits = DispatchLimits(settings.queue_timeout_seconds, settings.no_worker_timeout_seconds)
        dispatcher = Dispatcher(settings.router_id, fleet, queue, link, limits, metrics)
        generator = Generator(fleet, dispatcher, link, metrics)
        inbox = TokenInbox(generator, link, metrics)
        metrics.watch(
            "kunserve_router_inflight_requests", "requests not ended", lambda: len(generator)
        )
        metrics.watch(
            "kunserve_router_queued_requests", "requests waiting for a worker", lambda: len(queue)
        )
        watchdog = Watchdog(
            bus,
            fleet,
            dispatcher,
            generator,
            inbox,
            link,
            slow_client_timeout_seconds=settings.slow_client_timeout_seconds,
            disconnected_timeout_seconds=settings.no_worker_timeout_seconds,
        )
        context = ApiContext(
            model=model,
            tokenizer=tokenizer,
            fleet=fleet,
            generator=generator,
            metrics=metrics,
            bus=bus,
            subjects=self._subjects,
            drain=DrainState(),
            max_batch_prompts=settings.max_batch_prompts,
        )
        observer = Observer(fleet, dispatcher, generator, metrics)
        reporter = QueueReporter(bus, self._subjects, settings.router_id, queue)
        return _Parts(context, watchdog, observer, inbox, queue, reporter)

    def _served_model(self, tokenizer: ModelTokenizer) -> ServedModel:
        settings, facts = self._settings, tokenizer.facts
        length = facts.max_model_len
        if settings.max_model_len is not None:
            length = min(length, settings.max_model_len)
        uses_model_defaults = settings.generation_config is GenerationDefaults.AUTO
        return ServedModel(
            name=served_name(settings),
            # Load generators take their tokenizer from there when they run on this machine.
            root=str(facts.directory),
            source=settings.model,
            max_model_len=length,
            sampling_defaults=facts.sampling_defaults if uses_model_defaults else {},
        )

    def _lease(self, members: KeyValue) -> Lease:
        info = RouterInfo(
            router_id=self._settings.router_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            url=self.url,
            started_at=time.time(),
        )
        key = router_key(self._settings.router_id)
        return Lease(self._bus, members, key, info, self._settings.lease_ttl_seconds)

    async def _listen(self) -> web.AppRunner:
        """Listen; raises ConfigError where the address cannot be used."""
        settings = self._settings
        app = create_app(
            self._parts.context,
            api_key=settings.api_key,
            admin_key=settings.admin_key,
            max_body_bytes=settings.max_body_bytes,
        )
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=settings.keepalive_timeout_seconds,
            shutdown_timeout=_HTTP_SHUTDOWN_SECONDS,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, settings.host, settings.port, backlog=1024).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port} (--host, --port):"
                f" {os.strerror(error.errno) if error.errno else error}"
            ) from error
        host = settings.host if settings.host not in ("0.0.0.0", "::") else socket.gethostname()
        self.url = f"http://{host}:{runner.addresses[0][1]}"
        return runner

    async def _drain(self) -> None:
        """Take no new requests and let the running ones finish, for a while."""
        context = self._parts.context
        context.drain.is_draining = True
        self._log.info("router.draining", requests=len(context.generator))
        try:
            async with asyncio.timeout(self._settings.drain_timeout_seconds):
                await context.generator.wait_idle()
        except TimeoutError:
            self._log.warning("router.drain_timeout", requests=len(context.generator))
