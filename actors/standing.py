"""What each account is expected to be, and whether it was found so; kept over restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import structlog

from actors.ledger import Ledger
from cluster.core import standing
from cluster.core.ports import Movement, Network
from cluster.core.standing import Place, Standing
from cluster.core.types import AccountView, Address, Timestamp, Wei
from cluster.journal import STANDING as _STANDING


class Standings:
    """`most_gas`: what an account lacks beyond it didn't go for gas."""

    def __init__(
        self,
        ledger: Ledger,
        network: Network,
        accounts: Mapping[int, Address],
        most_gas: int,
        clock: Callable[[], float],
    ) -> None:
        self.most_gas = most_gas
        self._ledger = ledger
        self._network = network
        self._accounts = accounts
        self._clock = clock
        stored = ledger.journal.cursors(_STANDING)
        self._known = {Address(each): standing.parsed(text) for each, text in stored.items()}
        self._seen_well: dict[Address, int] = {}
        """Moments at which accounts were last found as they should be, in this term."""
        self._log = structlog.get_logger("fleet")

    def of(self, account: Address) -> Standing:
        return self._known.get(account, Standing())

    def seen_well(self, account: Address) -> int | None:
        """When it was last found as it should be, in this term."""
        return self._seen_well.get(account)

    def odd(self) -> frozenset[Address]:
        """Those for which nothing is done."""
        return frozenset(a for a, each in self._ours() if each.held or each.is_doubtful)

    def held(self) -> dict[Address, str]:
        """Why nothing is done for them until the operator has looked at them."""
        return {account: each.held for account, each in self._ours() if each.held}

    def unclear(self) -> list[Address]:
        """They aren't as they should be, and it can't be said why."""
        now = self._now()
        return [account for account, each in self._ours() if standing.is_unclear(each, now)]

    def kicked_out(self) -> dict[Address, Standing]:
        """Those that can't join again yet."""
        now = self._now()
        return {account: each for account, each in self._ours() if each.rejoin_at > now}

    def _ours(self) -> Iterator[tuple[Address, Standing]]:
        """What is stored may be of accounts that the configuration has no more."""
        ours = set(self._accounts.values())
        return ((account, each) for account, each in self._known.items() if account in ours)

    # --- what is found, and heard ----------------------------------------------------------------

    def looked(self, view: AccountView, sure: bool = True) -> None:
        """The account was looked at. `sure`: all is known that the network did to it until then."""
        account = view.account.address
        before, settled, paid = self.of(account), self._settled(view), self._paid_block(view)
        now, gas = self._now(), self.most_gas
        after = standing.judged(before, view.account, now, sure, paid, gas, settled)
        self._keep(account, after)
        if settled and not after.is_doubtful:
            self._seen_well[account] = view.moment
        if after.held and not before.held:
            self._log.error("account_held", account=account, reason=after.held)
        elif after.is_doubtful and not before.is_doubtful:
            status = view.account.status.name.lower()
            self._log.warning("account_in_doubt", account=account, status=status)

    def puzzled(self, view: AccountView) -> bool:
        """Whether something happened to the account that nobody has heard of."""
        before, settled = self.of(view.account.address), self._settled(view)
        paid, gas = self._paid_block(view), self.most_gas
        return standing.is_puzzling(before, view.account, paid, gas, settled)

    def kicked(self, account: Address, moment: int = 0) -> bool:
        """False for a kick that has been counted."""
        before = self.of(account)
        after = standing.kicked(before, self._now(), moment)
        self._keep(account, after)
        return after != before

    def slashed(self, account: Address, moment: int) -> None:
        self._keep(account, standing.slashed(self.of(account), moment))

    def cleared(self, account: Address) -> None:
        """The operator has looked at it."""
        self._keep(account, standing.cleared(self.of(account)))

    # --- what we are about to ask for ------------------------------------------------------------

    def asked(self, account: Address, place: Place) -> None:
        self._keep(account, standing.asked(self.of(account), place))

    def owed(self, account: Address, amount: Wei) -> None:
        """It is to be paid so much."""
        paid = self._movement(account).paid_block
        self._keep(account, standing.owed(self.of(account), amount, paid))

    def gave(self, account: Address, amount: Wei) -> None:
        """It is to pay so much."""
        self._keep(account, standing.gave(self.of(account), amount))

    # --- with the network ------------------------------------------------------------------------

    def _settled(self, view: AccountView) -> bool:
        """Whether the look shows everything that we have asked for, and heard of."""
        account = view.account.address
        there = self._movement(account)
        newest = max(there.block, self.of(account).told)
        return not there.is_open and view.moment >= newest

    def _paid_block(self, view: AccountView) -> int:
        """The moment of the newest payment to the account; 0 when the look is older."""
        there = self._movement(view.account.address)
        return there.paid_block if there.paid_block <= view.moment else 0

    def _movement(self, account: Address) -> Movement:
        return self._network.movements().get(account, Movement())

    def _now(self) -> Timestamp:
        return Timestamp(self._clock())

    def _keep(self, account: Address, new: Standing) -> None:
        if new != self._known.get(account):
            journal, lease = self._ledger.journal, self._ledger.lease
            journal.set_cursor(lease, f"{_STANDING}{account}", standing.text(new))
            self._known[account] = new
