"""What the outbox is given: settings, a signer, a clock, and somebody who counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.chain.fees import FeeSettings
from cluster.chain.rpc import PENDING
from cluster.core.types import Address, Timestamp, Wei

Clock = Callable[[], Timestamp]
Transaction = Mapping[str, int | str]


class Signer(Protocol):
    def sign_transaction(self, account: Address, transaction: Transaction, /) -> bytes:
        """The signed bytes of a transaction given by the fields of a legacy (EIP-155) one."""
        ...


ChainEvent = Literal["replaced", "vanished", "reorganised", "gap_closed"]


class Told(Protocol):
    """Hears of what is counted."""

    def happened(self, event: ChainEvent, /) -> None: ...

    def spent(self, account: Address, wei: Wei, /) -> None: ...


class Untold:
    """Nobody counts."""

    def happened(self, event: ChainEvent, /) -> None:
        pass

    def spent(self, account: Address, wei: Wei, /) -> None:
        pass


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """Times in seconds.

    `replace_after`, and so many `replace_blocks`: how long a transaction may wait to be mined
    before it offers more; with a deadline near, a quarter of the time. `look_after`: between two
    looks at what is stuck. `depth`: blocks on top of its own that make it final. `displaced_after`:
    a transaction whose nonce is spent, and that the chain doesn't have, is given up only so long
    after that was first seen, and a missing nonce is closed: an endpoint of many machines may lag
    behind itself. `refused_after`: what no endpoint takes for so long is an alert, and what
    an account can't pay for so long is given up. `simulate_at`:
    "pending", because a latest block that is old judges deadlines by an old clock.
    """

    fees: FeeSettings = FeeSettings()  # noqa: RUF009 - frozen
    gas_percent: int = 130
    gas_cap: int = 5_000_000
    retry_after: float = 1.0
    recheck_after: float = 15.0
    rebroadcast_after: float = 20.0
    displaced_after: float = 60.0
    refused_after: float = 60.0
    replace_after: float = 30.0
    replace_blocks: int = 2
    look_after: float = 5.0
    depth: int = 12
    poll: float = 1.0
    parallel: int = 16
    simulate_at: str = PENDING
