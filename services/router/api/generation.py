"""One output of a request while it is generated, and several of them side by side.

An `OutputRun` turns a session's token items into deltas and keeps the figures (tokens, latencies).
Handlers read runs with `merged_deltas` and close them whatever happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from services.router.api.output import Delta, OutputOptions, OutputProcessor, merge_deltas
from services.router.generator import Generator
from services.router.metrics import RouterMetrics
from services.router.session import GenerationInput
from services.router.tokenizer import ModelTokenizer

#: A reader so many engine steps behind is slow: it gets them as one chunk.
MERGE_ABOVE_ITEMS = 16


class OutputRun:
    """One choice of the answer."""

    def __init__(
        self,
        generator: Generator,
        request: GenerationInput,
        options: OutputOptions,
        tokenizer: ModelTokenizer,
        metrics: RouterMetrics,
    ) -> None:
        self.session = generator.open(request)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.is_done = False
        self._generator = generator
        self._output = OutputProcessor(tokenizer, options)
        self._metrics = metrics
        self._started_at = time.monotonic()
        self._last_token_at: float | None = None

    @property
    def num_output_tokens(self) -> int:
        return self._output.num_tokens

    async def next_deltas(self) -> list[Delta]:
        """What came since the last call, at least one delta; waits for it.

        Raises:
            ApiError: the request failed.
        """
        items = await self._generator.next_items(self.session)
        deltas: list[Delta] = []
        for item in items:
            if item.queued_seconds is not None:
                self._metrics.queue_time.observe(item.queued_seconds)
            delta = self._output.push(item)
            self._observe(len(delta.token_ids))
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._finish(delta.finish_reason.value)
                break
        return [merge_deltas(deltas)] if len(deltas) > MERGE_ABOVE_ITEMS else deltas

    async def close(self) -> None:
        """End the request; cancels it at the worker unless it is over there."""
        await self._generator.close(self.session)

    def _observe(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now = time.monotonic()
        if self._last_token_at is None:
            self._metrics.time_to_first_token.observe(now - self._started_at)
        else:
            self._metrics.inter_token_latency.observe(now - self._last_token_at)
        self._last_token_at = now
        self._metrics.generation_tokens.inc(num_tokens)

    def _finish(self, reason: str) -> None:
        self.is_done = True
        self._metrics.e2e_latency.observe(time.monotonic() - self._started_at)
        self._metrics.prompt_tokens.inc(self.num_prompt_tokens)
        self._metrics.finish(reason)


async def merged_deltas(
    runs: Sequence[OutputRun],
) -> AsyncGenerator[tuple[int, list[Delta]], None]:
    """The deltas of all runs as they come, each with its run's index, until all are done."""
    if len(runs) == 1:
        while not runs[0].is_done:
            yield 0, await runs[0].next_deltas()
        return
    tasks = {asyncio.create_task(run.next_deltas()): index for index, run in enumerate(runs)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = tasks.pop(task)
                yield index, task.result()
                if not runs[index].is_done:
                    tasks[asyncio.create_task(runs[index].next_deltas())] = index
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ClientWatch:
    """Marks when a handler writes to its client, so that the watchdog can end a stalled one."""

    def __init__(self, run: OutputRun, close_connection: Callable[[], None]) -> None:
        self._session = run.session
        self._session.on_stalled = close_connection

    def __enter__(self) -> None:
        self._session.writing_since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._session.writing_since = None
