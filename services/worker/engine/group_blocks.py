"""The blocks of a scheduler's requests on every stage of their routes.

    stage 0 = this worker      BlockManager      block ids
    stage 1 ... of a pipeline  StageBooking      counts; the stage has its own ids

A request gets what it needs on all stages of its route, or nothing. With no remote stage this is
the worker's BlockManager and no more. Called by the request pool and the batch builder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from services.worker.engine.block_manager import (
    BlockIntegrityError,
    BlockManager,
    BlockMove,
    BlockOwner,
    BlockSwap,
)
from services.worker.engine.releases import Releases
from services.worker.engine.request import Request
from services.worker.engine.routes import Route, WorkerId
from services.worker.engine.stage_blocks import StageBlocks, StageCapacityError
from services.worker.engine.stage_booking import StageBooking


class GroupBlocks:
    """Blocks on this worker and bookings on others.

    Attributes:
        stage: what this worker holds for requests that others schedule.
        releases: whose blocks other workers shall free.
    """

    def __init__(self, local: BlockManager, worker_id: WorkerId) -> None:
        self.stage = StageBlocks(local)
        self.releases = Releases()
        self._local = local
        self._worker_id = worker_id
        self._bookings: dict[WorkerId, StageBooking] = {}

    # --- what is there ---------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy on each stage."""
        return self._local.blocks_for(num_tokens)

    def capacity(self, worker_id: WorkerId) -> int:
        """Blocks on a worker that requests of this scheduler may use, free or not."""
        if worker_id != self._worker_id:
            return self._booking(worker_id).num_blocks
        return self._local.num_blocks - self.stage.num_granted_blocks

    def num_free(self, worker_id: WorkerId) -> int:
        """Blocks on a worker that may still be allocated."""
        if worker_id != self._worker_id:
            return self._booking(worker_id).num_free_blocks
        return self._local.num_free_blocks - self.stage.num_reserved_blocks

    def num_used(self, worker_id: WorkerId) -> int:
        """Blocks on a worker that requests of this scheduler hold."""
        if worker_id != self._worker_id:
            return self._booking(worker_id).num_used_blocks
        return self._local.num_used_blocks - self.stage.num_used_blocks

    def route_capacity(self, route: Route) -> int:
        """Blocks of the stage of `route` that has the fewest."""
        return min(self.capacity(worker_id) for worker_id in route.worker_ids)

    def route_free(self, route: Route) -> int:
        """Free blocks of the stage of `route` that has the fewest."""
        return min(self.num_free(worker_id) for worker_id in route.worker_ids)

    @property
    def num_local_used(self) -> int:
        """Blocks of this worker in use, by own requests or by those of other leaders."""
        return self._local.num_used_blocks

    def num_held(self, request: Request, worker_id: WorkerId) -> int:
        """Blocks that `request` has on a worker."""
        if worker_id == self._worker_id:
            return len(request.block_table)
        return self._booking(worker_id).num_held(request.kv_key)

    def holds(self, request: Request, worker_id: WorkerId) -> bool:
        """True if `request` has blocks on that worker."""
        return self.num_held(request, worker_id) > 0

    # --- allocation ------------------------------------------------------------------------------

    def short_stages(
        self, request: Request, route: Route, num_tokens: int, spare_blocks: int = 0
    ) -> list[WorkerId]:
        """Workers of `route` without room for the first `num_tokens` tokens of `request`.

        Args:
            spare_blocks: blocks that must stay free on each.
        """
        num_blocks = self._local.blocks_for(num_tokens)
        short = []
        for stage in route.stages:
            num_missing = num_blocks - self.num_held(request, stage.worker_id)
            num_wanted = max(0, num_missing) + spare_blocks
            if num_wanted > 0 and num_wanted > self.num_free(stage.worker_id):
                short.append(stage.worker_id)
        return short

    def allocate(self, request: Request, route: Route, num_tokens: int) -> bool:
        """Give `request` blocks for its first `num_tokens` tokens on every stage of `route`.

        All or nothing: returns False, having changed nothing, if a stage has too few.
        """
        num_blocks, key = self._local.blocks_for(num_tokens), request.kv_key
        growing = [w for w in route.worker_ids if self.num_held(request, w) < num_blocks]
        for worker_id in growing:
            if num_blocks - self.num_held(request, worker_id) > self.num_free(worker_id):
                return False
        for worker_id in growing:
            if worker_id == self._worker_id:
                self._local.allocate(request, num_tokens)
            else:
                self._booking(worker_id).hold(key, num_blocks)
        return True

    def trim(self, request: Request, num_tokens: int) -> None:
        """Take back what `request` holds beyond its first `num_tokens` tokens.

        Stages need not be told: they take blocks only for tokens that they compute or receive.
        """
        self._local.trim(request, num_tokens)
        num_blocks, key = self._local.blocks_for(num_tokens), request.kv_key
        for booking in self._bookings.values():
            if booking.num_held(key) > num_blocks:
                booking.hold(key, num_blocks)

    def free(self, request: Request, kept: Collection[WorkerId] = ()) -> None:
        """Take back all blocks of `request`, but for those on the workers `kept`."""
        if self._worker_id not in kept:
            self._local.free(request)
        key = request.kv_key
        for worker_id, booking in self._bookings.items():
            if worker_id not in kept and booking.release(key):
                self.releases.add(worker_id, key)

    # --- requests that come and go with their KV -------------------------------------------------

    def adopt(self, request: Request, origin: Route) -> None:
        """Take over a request that another worker scheduled: its blocks, and the grants of them.

        KeyError, nothing having changed, if some should be here and are not.
        """
        if self._worker_id in origin.worker_ids:
            request.block_table[:] = self.stage.claim(request.kv_key)
        num_blocks = self._local.blocks_for(request.num_computed_tokens)
        for worker_id in origin.worker_ids:
            if worker_id != self._worker_id:
                booking = self._booking(worker_id)
                booking.hold(request.kv_key, num_blocks)
                booking.num_blocks += num_blocks

    def hand_over(self, request: Request) -> None:
        """Leave the blocks of `request` where they lie; another scheduler answers for them.

        Those on this worker are held under its key from now on. The grants of those elsewhere go
        with the request.
        """
        if request.block_table:
            self.stage.hold(request.kv_key, list(request.block_table), request.num_computed_tokens)
            request.block_table.clear()
        for booking in self._bookings.values():
            booking.num_blocks -= booking.release(request.kv_key)

    # --- size ------------------------------------------------------------------------------------

    def add_capacity(self, worker_id: WorkerId, num_blocks: int) -> None:
        """Take note that another worker granted `num_blocks` more (`StageBlocks.lend`)."""
        self._booking(worker_id).num_blocks += num_blocks

    def give_back(self, worker_id: WorkerId, num_kept: int = 0) -> int:
        """Do without what another worker granted, but for `num_kept` blocks and those in use.

        Returns how many that are; the worker is to be told (`StageBlocks.take_back`), behind the
        keys released so far.
        """
        booking = self._booking(worker_id)
        num_blocks = max(0, booking.num_blocks - max(num_kept, booking.num_used_blocks))
        booking.num_blocks -= num_blocks
        return num_blocks

    def forget_worker(self, worker_id: WorkerId) -> None:
        """Drop everything booked on a worker, and what it was to be told."""
        self._bookings.pop(worker_id, None)
        self.releases.forget_worker(worker_id)

    def start_over(self, num_blocks: int) -> None:
        """This worker has `num_blocks` blocks and nothing to do with others any more.

        Own requests must hold none.
        """
        self.stage.release_all()
        for worker_id in list(self._bookings):
            self.forget_worker(worker_id)
        self._local.shrink(min(num_blocks, self._local.num_blocks), ())
        self._local.grow(num_blocks)

    def grow(self, num_blocks: int) -> None:
        """Add blocks to this worker's pool; see `BlockManager.grow`."""
        self._local.grow(num_blocks)

    def shrink(self, num_blocks: int, requests: Iterable[Request]) -> list[BlockMove]:
        """Leave own requests `num_blocks` of this worker's blocks; see `BlockManager.shrink`.

        What is held for others or granted to them stays on top of that, and is compacted too.

        Raises:
            StageCapacityError: own requests hold more; nothing has changed.
        """
        num_left = num_blocks + self.stage.num_granted_blocks
        moves = None
        if self.num_used(self._worker_id) <= num_blocks:
            moves = self._local.shrink(num_left, (*requests, *self.stage.owners))
        if moves is None:
            raise StageCapacityError(f"requests hold more than {num_blocks} blocks")
        return moves

    def bring_forward(
        self, first: Iterable[BlockOwner], requests: Iterable[Request]
    ) -> list[BlockSwap]:
        """Give those of `first` this worker's lowest ids; see `BlockManager.bring_forward`.

        Args:
            requests: all own requests.
        """
        return self._local.bring_forward(first, (*requests, *self.stage.owners))

    # --- integrity -------------------------------------------------------------------------------

    def check_integrity(self, requests: Collection[Request]) -> None:
        """Check that every block is free or belongs to exactly one request.

        Raises:
            BlockIntegrityError: naming the first block, booking or request where that is not so.
        """
        self._local.check_integrity(
            (*(r for r in requests if self._is_local(r)), *self.stage.owners)
        )
        self.stage.check_integrity()
        known = {request.kv_key for request in requests}
        for worker_id, booking in self._bookings.items():
            strangers = booking.held.keys() - known
            if strangers:
                raise BlockIntegrityError(f"{min(strangers)} has blocks on {worker_id} but is gone")
            if sum(booking.held.values()) != booking.num_used_blocks:
                raise BlockIntegrityError(f"the bookings on {worker_id} do not add up")
        for request in requests:
            self._check_coverage(request)

    def _check_coverage(self, request: Request) -> None:
        num_blocks = self._local.blocks_for(request.num_computed_tokens)
        for worker_id in () if request.route is None else request.route.worker_ids:
            if worker_id == self._worker_id:
                continue
            num_held = self._booking(worker_id).num_held(request.kv_key)
            if num_held < num_blocks:
                raise BlockIntegrityError(
                    f"request {request.request_id} has {request.num_computed_tokens} computed"
                    f" tokens but only {num_held} blocks on {worker_id}"
                )

    def _is_local(self, request: Request) -> bool:
        """True if `request` has blocks on this worker, or should have."""
        route = request.route
        return bool(request.block_table) or route is None or self._worker_id in route.worker_ids

    def _booking(self, worker_id: WorkerId) -> StageBooking:
        booking = self._bookings.get(worker_id)
        if booking is None:
            booking = self._bookings[worker_id] = StageBooking()
        return booking
