"""All running requests: opened by handlers, fed by the token inbox, ended one way or another.

`next_items` is the engine of a request. Its caller gets tokens; dispatch, lost frames, dead
workers and replays happen inside. A replay sends prompt and tokens so far to another worker, which
goes on after them: same seed, same positions, same tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import structlog

from services.router.dispatcher import Dispatcher
from services.router.errors import GenerationFailedError
from services.router.fleet import Fleet
from services.router.link import Reach, WorkerLink
from services.router.metrics import RouterMetrics
from services.router.request_state import IllegalTransitionError, RequestState, Verdict
from services.router.session import GenerationInput, Session
from shared.messages import FinishReason, TokenItem

#: A request that loses so many workers is more likely the cause than the victim.
MAX_LOSSES = 8
#: So many fruitless questions for missing tokens, and the stream counts as lost.
MAX_SILENT_RESUMES = 5


class Generator:
    """The sessions of this router."""

    def __init__(
        self, fleet: Fleet, dispatcher: Dispatcher, link: WorkerLink, metrics: RouterMetrics
    ) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._link = link
        self._metrics = metrics
        self._sessions: dict[str, Session] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._log = structlog.get_logger(component="generator")

    def __len__(self) -> int:
        return len(self._sessions)

    def sessions(self) -> list[Session]:
        """All sessions that are not over."""
        return list(self._sessions.values())

    def streaming(self) -> Iterator[Session]:
        """Sessions that a worker has accepted."""
        return (
            session
            for session in self._sessions.values()
            if session.stream.state is RequestState.STREAMING
        )

    def open(self, request: GenerationInput) -> Session:
        """Begin a request. Its reader must end it with `close`."""
        session = Session(request, time.monotonic())
        self._sessions[request.request_id] = session
        self._is_idle.clear()
        return session

    async def wait_idle(self) -> None:
        """Return when there is no session; the caller sets the deadline."""
        await self._is_idle.wait()

    async def next_items(self, session: Session) -> list[TokenItem]:
        """The next tokens, at least one item; the last one has a finish reason.

        Raises:
            ApiError: the request failed.
        """
        stream = session.stream
        while True:
            if stream.pending:
                items = self._judge(session, stream.take())
                if items:
                    return items
            elif session.failure is not None:
                raise session.failure
            elif stream.state is RequestState.QUEUED:
                await self._dispatcher.dispatch(session)
            elif stream.state is RequestState.LOST:
                ending = await self._prepare_replay(session)
                if ending is not None:
                    return [ending]
            elif stream.state is not RequestState.STREAMING:
                raise IllegalTransitionError(f"reading a request that is {stream.state}")
            elif session.wants_resume:
                await self._resume(session)
            else:
                await session.wait()

    async def close(self, session: Session) -> None:
        """End a session, whatever its state; frees what a worker holds for it."""
        stream = session.stream
        self._sessions.pop(session.request.request_id, None)
        if not self._sessions:
            self._is_idle.set()
        if stream.is_over:
            return
        was_live = stream.is_live
        stream.move(RequestState.CANCELLED)
        if was_live:
            await self._cancel(session)

    def deliver(self, item: TokenItem, worker_id: str, now: float) -> Verdict:
        """Hand an item to its session; STALE where nobody wants it any more."""
        session = self._sessions.get(item.request_id)
        if session is None:
            return Verdict.STALE
        is_known = session.stream.has_gap  # until it is filled, everything that comes is early
        verdict = session.deliver(item, worker_id, now)
        if verdict is Verdict.GAP and not is_known:
            self._metrics.stream_gaps.inc()
        return verdict

    def lose_worker(self, worker_id: str, reason: str) -> None:
        """A worker is gone: replay all it was doing, and send it nothing before it reports."""
        lost = [session for session in self.streaming() if session.worker_id == worker_id]
        self._fleet.mark_full(worker_id)
        if lost:
            self._log.warning("worker.lost", worker=worker_id, reason=reason, streams=len(lost))
        for session in lost:
            session.lose()

    def _judge(self, session: Session, items: list[TokenItem]) -> list[TokenItem]:
        """Act on the end of a stream, if it is among the items."""
        last = items[-1]
        match last.finish_reason:
            case None:
                return items
            case FinishReason.ABORT:
                # Not asked for by this router: the worker gave it up, another can go on.
                session.lose()
                return [item for item in _without_end(items) if item.token_ids]
            case FinishReason.LOST:
                self._fleet.mark_broken(session.worker_id)
                session.replay()
                return [item for item in _without_end(items) if item.token_ids]
            case FinishReason.ERROR:
                self._end(session, RequestState.FAILED)
                raise GenerationFailedError(last.error or "the worker failed this request")
            case FinishReason.STOP | FinishReason.LENGTH:
                self._end(session, RequestState.FINISHED)
                return items

    @staticmethod
    def _end(session: Session, state: RequestState) -> None:
        if not session.stream.is_over:
            session.stream.move(state)

    async def _prepare_replay(self, session: Session) -> TokenItem | None:
        """Make a lost request ready for another worker; its end where nothing is missing."""
        await self._cancel(session)
        if session.num_losses > MAX_LOSSES:
            session.stream.move(RequestState.FAILED)
            raise GenerationFailedError(
                f"{session.num_losses} workers were lost while serving this request"
            )
        self._metrics.migrations.inc()
        session.stream.move(RequestState.QUEUED)
        ending = _known_ending(session)
        if ending is not None:
            session.stream.move(RequestState.FINISHED)
        return ending

    async def _resume(self, session: Session) -> None:
        session.wants_resume = False
        session.resumed_at = time.monotonic()
        session.num_silent_resumes += 1
        match await self._link.resume(session):
            case Reach.UNKNOWN:
                session.lose()
            case Reach.YES:
                session.stream.last_heard_at = time.monotonic()
                if not session.stream.has_gap:
                    session.num_silent_resumes = 0
            case Reach.DISCONNECTED:
                session.num_silent_resumes = 0  # asked again after the reconnect
            case Reach.GONE | Reach.SILENT:
                pass  # the watchdog judges the worker; here only the stream's patience counts
        if session.num_silent_resumes >= MAX_SILENT_RESUMES:
            session.lose()

    async def _cancel(self, session: Session) -> None:
        self._metrics.cancellations.inc()
        await self._link.cancel(
            session.worker_id, session.request.request_id, session.stream.attempt
        )


def _without_end(items: list[TokenItem]) -> list[TokenItem]:
    """The items of an attempt that ended; its request goes on."""
    return [*items[:-1], items[-1].model_copy(update={"finish_reason": None})]


def _known_ending(session: Session) -> TokenItem | None:
    """The last item of a request whose tokens are all here though its end got lost."""
    request, token_ids = session.request, session.stream.output_token_ids
    sampling = request.sampling
    reason: FinishReason | None = None
    stop_token_id = None
    if token_ids and len(token_ids) > sampling.min_tokens:
        if token_ids[-1] in request.eos_token_ids and not sampling.ignore_eos:
            reason = FinishReason.STOP
        elif token_ids[-1] in sampling.stop_token_ids:
            reason, stop_token_id = FinishReason.STOP, token_ids[-1]
    if reason is None and len(token_ids) >= sampling.max_tokens:
        reason = FinishReason.LENGTH
    if reason is None:
        return None
    return TokenItem(
        request_id=request.request_id,
        attempt=session.stream.attempt,
        index=len(token_ids),
        finish_reason=reason,
        stop_token_id=stop_token_id,
    )
