"""Carries weights between the members of a group: from one that has a layer to one that loads it.

    loads the layer                                has it
    WeightsRequest [offset, offset + window) ----> piece by piece, between its batches
    write what came, between batches <-- Weights --'
    WeightsRequest of the next window ...

An arena's bytes are the same on all workers that pack alike, so they travel as they are. They are
copied before they are sent: their owner may give the layer up at any time. A GPU writes what came
by itself: an arena is filled when the device has written it, and its giver is not gone by then.
Engine thread.

Who may read the owner's memory asks where the arena lies, copies it from there, and asks again: if
the owner still has it then, it has had it all the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch

from services.worker.channels.base import Packed
from services.worker.links.base import LinkClass, LinkDownError, LinkFrame, PeerMemory
from services.worker.memory.base import FileRun
from services.worker.memory.tensors import tensor_at
from services.worker.model.plan import ArenaPlan
from services.worker.model.runner import ModelRunner
from services.worker.pipeline.device_mark import mark
from services.worker.pipeline.messages import FrameKind, WeightsPart, WeightsRequest
from services.worker.pipeline.peers import BulkContent, GroupPeers
from services.worker.work_pacer import WorkPacer
from shared.errors import KunserveError

_PIECE_BYTES = 1024 * 1024
#: Asked for at once: what may lie in buffers beside the budget.
_WINDOW_BYTES = 16 * _PIECE_BYTES
#: A peer that sends nothing for so long is not asked any more.
_PATIENCE_SECONDS = 2.0
#: Share of the time that giving may take while batches run; most members load meanwhile, too.
_SHARE = 0.03


class WeightsNotGivenError(KunserveError):
    """No other member gives these weights; says why."""


class WeightCourier:
    """One member's side of all weights that travel in a group; an `ArenaSource`."""

    def __init__(self, peers: GroupPeers, runner: ModelRunner) -> None:
        self._peers = peers
        self._stage = runner.stage
        self._pool = runner.pool
        self._asked: deque[WeightsRequest] = deque()
        self._serial = 0
        self._arrived: deque[tuple[WeightsPart, Packed]] = deque()
        self._pacer = WorkPacer(time.perf_counter(), _SHARE, runner.activity)

    # --- giving ----------------------------------------------------------------------------------

    def handle(self, frame: LinkFrame) -> None:
        """Take note of a request, or of weights."""
        if frame.kind == FrameKind.WEIGHTS_REQUEST:
            self._asked.append(WeightsRequest.decode(frame.header))
            return
        part = WeightsPart.decode(frame.header)
        if part.serial == self._serial:
            self._arrived.append((part, frame.buffers))
        else:
            self._peers.discard(part.worker_id, frame.buffers)

    @property
    def is_busy(self) -> bool:
        """True while `pump` has something to send."""
        return bool(self._asked)

    def pump(self) -> None:
        """Send pieces for as long as it may take now, and as long as the links take them."""
        if not self.is_busy:
            return
        now = time.perf_counter()
        ends_at = now + self._pacer.grant(now)
        while self._asked and now < ends_at:
            if self._peers.is_clogged(self._asked[0].worker_id, LinkClass.RESTORE):
                break
            self._give(self._asked.popleft())
            now = time.perf_counter()
        self._pacer.used(now)

    def _give(self, request: WeightsRequest) -> None:
        """Send the first piece of what is asked for; the rest is asked for again."""
        arena = self._stage.arena_bytes(request.arena)
        answer = WeightsPart(
            serial=request.serial, worker_id=self._peers.worker_id, offset=request.start
        )
        if arena is None or (len(arena), self._stage.panel_width) != (
            request.arena_bytes,
            request.panel_width,
        ):
            refusal = {"error": f"{self._peers.worker_id} has no such {request.arena}"}
            self._peers.send(
                request.worker_id, FrameKind.WEIGHTS, answer.model_copy(update=refusal)
            )
            return
        if self._peers.memory_of(request.worker_id) is not None:
            runs = self._pool.locate_arena(request.arena, request.start, request.end)
            place = answer.model_copy(update={"runs": tuple(runs)})
            self._peers.send(request.worker_id, FrameKind.WEIGHTS, place)
            return
        end = min(request.start + self._peers.part_bytes(request.worker_id), request.end)
        piece = arena[request.start : end]
        self._peers.send_bulk(
            request.worker_id,
            LinkClass.RESTORE,
            FrameKind.WEIGHTS,
            answer,
            BulkContent(len(piece), lambda place: place.copy_(piece)),
        )
        if end < request.end:
            self._asked.appendleft(request.model_copy(update={"start": end}))

    # --- getting ---------------------------------------------------------------------------------

    def has(self, arena_name: str) -> bool:
        """True if another member of the group should have the arena."""
        return self._holder(arena_name) is not None

    def fill(self, arena: ArenaPlan, address: int) -> Iterator[int]:
        """Write an arena with what another member sends; yields 0 while nothing has come.

        Raises:
            WeightsNotGivenError: nobody has it, or who has it does not send it.
        """
        holder = self._holder(arena.name)
        if holder is None:
            raise WeightsNotGivenError(f"no other member has {arena.name}")
        memory = self._peers.memory_of(holder)
        try:
            if memory is not None:
                yield from self._read(arena, address, holder, memory)
                return
            for start in range(0, arena.layout.nbytes, _WINDOW_BYTES):
                end = min(start + _WINDOW_BYTES, arena.layout.nbytes)
                self._ask(holder, arena, start, end)
                yield from self._write(address, end - start)
            yield from self._land(holder)
        finally:
            self._serial += 1  # what still comes is not wanted
            while self._arrived:
                part, packed = self._arrived.popleft()
                self._peers.discard(part.worker_id, packed)

    def _ask(self, holder: str, arena: ArenaPlan, start: int, end: int) -> None:
        request = WeightsRequest(
            serial=self._serial,
            worker_id=self._peers.worker_id,
            arena=arena.name,
            arena_bytes=arena.layout.nbytes,
            panel_width=self._stage.panel_width,
            start=start,
            end=end,
        )
        self._peers.send(holder, FrameKind.WEIGHTS_REQUEST, request)

    def _read(
        self, arena: ArenaPlan, address: int, holder: str, memory: PeerMemory
    ) -> Iterator[int]:
        """Copy an arena out of the memory of who has it."""
        nbytes = arena.layout.nbytes
        self._ask(holder, arena, 0, nbytes)
        part, _ = yield from self._answer()
        target = tensor_at(address, (nbytes,), torch.uint8).numpy()
        position = 0
        for run in _pieces(part.runs):
            np.copyto(target[position : position + run.nbytes], memory.view(run))
            position += run.nbytes
            yield run.nbytes
        self._ask(holder, arena, nbytes, nbytes)
        yield from self._answer()

    def _write(self, address: int, num_missing: int) -> Iterator[int]:
        """Write what comes of a window."""
        while num_missing > 0:
            part, packed = yield from self._answer()
            try:
                with self._peers.received(part.worker_id, packed) as received:
                    nbytes = received.nbytes
                    place = tensor_at(
                        address + part.offset, (nbytes,), torch.uint8, self._stage.device
                    )
                    place.copy_(received)
            except LinkDownError as error:
                raise WeightsNotGivenError(f"{part.worker_id} is gone") from error
            num_missing -= nbytes
            yield nbytes

    def _land(self, holder: str) -> Iterator[int]:
        """Wait until the device has written what came, and make sure that it did come."""
        is_written = mark(self._stage.device)
        yield from _patiently(is_written)
        if not self._peers.is_up(holder):
            raise WeightsNotGivenError(f"{holder} is gone")

    def _answer(self) -> Generator[int, None, tuple[WeightsPart, Packed]]:
        """What has come; yields 0 while nothing has."""
        yield from _patiently(lambda: bool(self._arrived))
        part, packed = self._arrived.popleft()
        if part.error:
            raise WeightsNotGivenError(part.error)
        return part, packed

    def _holder(self, arena_name: str) -> str | None:
        for member in self._peers.group.members:
            is_here = member.worker_id == self._peers.worker_id
            if not is_here and arena_name in self._stage.arena_names(member.span):
                return member.worker_id
        return None


def _pieces(runs: Sequence[FileRun]) -> Iterator[FileRun]:
    """The same bytes, no piece of which takes long to copy."""
    for offset, nbytes in runs:
        for start in range(0, nbytes, _PIECE_BYTES):
            yield FileRun(offset + start, min(_PIECE_BYTES, nbytes - start))


def _patiently(condition: Callable[[], bool]) -> Iterator[int]:
    """Yield 0 until something is true; raises WeightsNotGivenError where that takes too long."""
    ends_at = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > ends_at:
            raise WeightsNotGivenError(f"nothing came for {_PATIENCE_SECONDS:g} s")
        yield 0
