"""The treasury: what it has, as long as that is believed, and what it pays the accounts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from cluster.core.errors import NetworkUnavailable
from cluster.core.ports import Movement, Network
from cluster.core.types import Address, Wei

TREASURY_SECONDS = 15.0
"""How long its balance is believed while nothing of ours changes it."""
MONEY_SECONDS = 60.0
"""Between two looks at it for people's eyes."""


class Treasury:
    def __init__(self, address: Address, network: Network, clock: Callable[[], float]) -> None:
        self.address = address
        self.had: Wei | None = None
        """When it was last looked at, in this term."""
        self._network = network
        self._clock = clock
        self._known: tuple[float, Wei, Movement] | None = None
        self._shown_at = float("-inf")

    async def show(self, anyway: bool) -> None:
        """Look now and then, or `anyway`, for people's eyes: no matter if that fails."""
        if anyway or self._clock() - self._shown_at > MONEY_SECONDS:
            self._shown_at = self._clock()
            with contextlib.suppress(NetworkUnavailable):
                await self.balance()

    async def balance(self) -> Wei:
        """Without what it is paying; asked for only when something is to be paid."""
        there, now = self._network.movements().get(self.address, Movement()), self._clock()
        known = self._known
        if known is None or now - known[0] > TREASURY_SECONDS or known[2] != there:
            self.had = await self._network.balance(self.address)
            known = self._known = (now, self.had, there)
        return Wei(max(0, known[1] - there.owes))

    async def pay(self, account: Address, amount: Wei, purpose: str) -> None:
        self._known = None
        await self._network.transfer(self.address, account, amount, purpose)
