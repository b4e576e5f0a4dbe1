"""What accounts' own writes the network refused, and how often in a row: what isn't likely to pass
is asked for more and more seldom, and an operator sees why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.chain.outbox_rows import REFUSED, OutboxRow, Patience, RowState
from cluster.core.ports import Refusal
from cluster.core.types import Address, Timestamp


@dataclass(frozen=True, slots=True)
class _Refused:
    row: OutboxRow
    """As it was when it was refused."""
    times: int


class Refusals:
    """Begins with what is `stored` as refused; how often, only this process knows."""

    def __init__(self, stored: Iterable[OutboxRow], patience: Patience) -> None:
        self._patience = patience
        self._found = {row.intent.key: _Refused(row, 1) for row in stored}
        self._by_account: Mapping[Address, tuple[Refusal, ...]] | None = None

    def times(self, key: str) -> int:
        return self._found[key].times if key in self._found else 1

    def resolved(self, row: OutboxRow) -> None:
        """A write was mined or refused."""
        if row.intent.task is not None:
            return
        key = row.intent.key
        self._by_account = None
        if row.state in REFUSED:
            before = self._found.get(key)
            self._found[key] = _Refused(row, 1 if before is None else before.times + 1)
        elif row.state is RowState.MINED:
            self._found.pop(key, None)

    def by_account(self) -> Mapping[Address, tuple[Refusal, ...]]:
        """By each account that they are from or to; the same object until there are others."""
        if self._by_account is None:
            self._by_account = self._sorted()
        return self._by_account

    def _sorted(self) -> Mapping[Address, tuple[Refusal, ...]]:
        found: dict[Address, list[Refusal]] = defaultdict(list)
        for each in self._found.values():
            intent = each.row.intent
            again = each.row.updated_at + self._patience.of_own(each.times)
            refusal = Refusal(intent.verb, each.row.reason, Timestamp(again))
            for concerned in {intent.account, intent.recipient}:
                found[concerned].append(refusal)
        return {account: tuple(refusals) for account, refusals in found.items()}
