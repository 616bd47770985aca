"""One request on its way through the router: what was asked, where it runs, what came back.

A session has one reader, the HTTP handler, which also drives it (`generator.py`): it dispatches,
waits, asks for lost tokens and replays. Everybody else only changes the session and wakes the
reader. So no request ever has a task of its own, and nothing outlives the handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.router.errors import ApiError
from services.router.request_state import RequestState, TokenStream, Verdict
from shared.messages import TokenItem, pack_token_ids
from shared.sampling import SamplingParams

#: Least time between two requests for the same missing tokens.
RESUME_PACE_SECONDS = 0.2


@dataclass(frozen=True)
class GenerationInput:
    """What a worker needs to know of a request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    traceparent: str = ""

    def packed_prompt(self) -> bytes:
        return pack_token_ids(self.prompt_token_ids)


class Session:
    """A request and its present attempt at a worker."""

    def __init__(self, request: GenerationInput, now: float) -> None:
        self.request = request
        self.stream = TokenStream(now)
        self.worker_id = ""
        self.wants_resume = False
        self.resumed_at = now
        self.num_silent_resumes = 0
        self.num_losses = 0  # workers that went away with it
        self.is_replay = False  # was lost before: the client may have tokens already
        self.failure: ApiError | None = None
        #: Since when the reader has been writing to its client; None when it is not.
        self.writing_since: float | None = None
        #: Called when the client does not read any more: closes its connection.
        self.on_stalled: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.request.prompt_token_ids) + len(self.stream.output_token_ids)

    def deliver(self, item: TokenItem, worker_id: str, now: float) -> Verdict:
        """Take an item from a token frame and wake the reader if it brings something.

        Whoever sends what is next, or comes after that, serves the request now: it may have moved
        to another worker of its group.
        """
        verdict = self.stream.accept(item, now)
        if verdict in (Verdict.NEW, Verdict.GAP):
            self.worker_id = worker_id
        if verdict is Verdict.NEW:
            self.num_silent_resumes = 0
            self.wake()
        elif verdict is Verdict.GAP:
            self.ask_again(now)
        return verdict

    def ask_again(self, now: float) -> None:
        """Have the reader ask the worker for what is missing, though not too often."""
        if (
            self.stream.state is RequestState.STREAMING
            and now - self.resumed_at >= RESUME_PACE_SECONDS
        ):
            self.wants_resume = True
            self.wake()

    def lose(self) -> None:
        """The worker is gone; the reader will replay the request. No-op where it is not running."""
        if self.stream.state is RequestState.STREAMING:
            self.num_losses += 1
            self.replay()

    def replay(self) -> None:
        """The worker cannot go on, through no fault of the request; the reader will replay it."""
        if self.stream.state is RequestState.STREAMING:
            self.stream.move(RequestState.LOST)
            self.is_replay = True
            self.wants_resume = False
            self.wake()

    def fail(self, error: ApiError) -> None:
        """End a running request with an error that the reader will raise."""
        if self.stream.state is RequestState.STREAMING:
            self.stream.move(RequestState.FAILED)
            self.failure = error
            self.wake()

    def wake(self) -> None:
        """Let the reader look."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Sleep until somebody calls `wake`.

        Bounded by the watchdog, which looks at every session and wakes the silent ones.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
