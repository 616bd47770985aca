"""Health, metrics, the cluster's layout, and what an operator may order.

Handlers read what the router knows already; only `/admin` waits for somebody, with a deadline.
"""

from __future__ import annotations

import importlib.metadata
import time

from aiohttp import web

from services.router.api.body import read_body
from services.router.api.context import ApiContext
from services.router.api.plan_view import plan_view
from services.router.api.schemas import DrainRequest, LayoutRequest
from services.router.cluster_view import cluster_view
from services.router.errors import BadRequestError, UnavailableError
from shared.bus.base import BusError
from shared.messages import AdminAction, AdminReply, AdminRequest
from shared.metrics import render
from shared.wire import MessageError

ADMIN_TIMEOUT_SECONDS = 5.0


def package_version() -> str:
    """The installed version; "unknown" in a bare checkout."""
    try:
        return importlib.metadata.version("kunserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class OperationsApi:
    """Endpoints for operators and their tools."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def health(self, request: web.Request) -> web.Response:
        """200 only if a request would succeed now; served as /health, /ready and /ping."""
        reasons = self._reasons()
        if reasons:
            raise UnavailableError("; ".join(reasons))
        return web.json_response({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.Response:
        return render(self._context.metrics.registry)

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": package_version()})

    async def load(self, request: web.Request) -> web.Response:
        """vLLM's shape: the requests in this server."""
        return web.json_response({"server_load": len(self._context.generator)})

    async def cluster(self, request: web.Request) -> web.Response:
        view = cluster_view(self._context.fleet)
        return web.json_response(view.model_dump(mode="json"))

    async def drain(self, request: web.Request) -> web.Response:
        """Have the planner drain a worker."""
        body = await read_body(request, DrainRequest)
        wish = AdminRequest(action=AdminAction.DRAIN, workers=(body.worker,))
        reply = await self._ask_planner(wish, param="worker")
        return web.json_response({"worker": body.worker, "detail": reply.detail})

    async def drop(self, request: web.Request) -> web.Response:
        """Have the planner free copies of layers now; answers with the plan."""
        return await self._change_layout(request, AdminAction.DROP)

    async def restore(self, request: web.Request) -> web.Response:
        """Have the planner make replicas again; answers with the plan."""
        return await self._change_layout(request, AdminAction.RESTORE)

    async def _change_layout(self, request: web.Request, action: AdminAction) -> web.Response:
        body = await read_body(request, LayoutRequest)
        wish = AdminRequest(
            action=action,
            workers=tuple(body.workers),
            dry_run=body.dry_run,
            hold_seconds=body.hold_seconds,
        )
        reply = await self._ask_planner(wish, param="workers")
        plan = plan_view(reply.plan) if reply.plan is not None else None
        return web.json_response({"detail": reply.detail, "plan": plan})

    async def _ask_planner(self, wish: AdminRequest, *, param: str) -> AdminReply:
        """The planner's consent; raises BadRequestError, UnavailableError."""
        try:
            answer = await self._context.bus.request(
                self._context.subjects.admin,
                wish.encode(),
                timeout_seconds=ADMIN_TIMEOUT_SECONDS,
            )
            reply = AdminReply.decode(answer)
        except (BusError, MessageError) as error:
            raise UnavailableError(f"no planner answered: {error}") from error
        if reply.error:
            raise BadRequestError(reply.error, param=param)
        return reply

    def _reasons(self) -> list[str]:
        """Why a request would not succeed now."""
        reasons = []
        if self._context.drain.is_draining:
            reasons.append("this router is shutting down")
        if not self._context.bus.is_connected:
            reasons.append("no connection to NATS")
        if not self._context.fleet.serving_groups(time.monotonic()):
            reasons.append("no worker serves the model")
        return reasons
