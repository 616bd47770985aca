"""One request on its way from one route to another, and who goes first.

    PARKED  ---blocks booked on every stage---> EXCHANGING ---every destination filled---> RUNNING

Until it runs again its KV stays complete where it was, so an exchange can be given up, or begun
anew towards another route, at any moment. Made by `RequestPool.park`, driven by `Relocation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.worker.engine.request import Request
from services.worker.engine.routes import Route, Transfer, WorkerId, transfers


@dataclass(slots=True, eq=False)
class Exchange:
    """What one parked request waits for.

    Attributes:
        origin: the workers that hold its KV, completely.
        target: where it goes on.
        transfers: what must travel.
        pending: destinations whose part has not arrived yet.
    """

    request: Request
    origin: Route
    target: Route
    transfers: tuple[Transfer, ...] = field(init=False)
    pending: set[WorkerId] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what must travel."""
        self.transfers = transfers(self.origin, self.target)
        self.pending = {transfer.destination for transfer in self.transfers}

    @property
    def num_token_layers(self) -> int:
        """What travels, in tokens times layers: bytes, but for a constant of the model."""
        num_layers = sum(transfer.end - transfer.start for transfer in self.transfers)
        return self.request.num_computed_tokens * num_layers


def exchange_order(exchanges: Iterable[Exchange]) -> list[Exchange]:
    """Fewest bytes first, because that lets most requests go on soonest; then oldest first."""
    return sorted(
        exchanges,
        key=lambda exchange: (exchange.num_token_layers, exchange.request.arrival_seconds),
    )
