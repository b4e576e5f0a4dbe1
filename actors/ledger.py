"""The open records in memory and the journal behind them: written first, then believed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.core.ports import Lease
from cluster.core.record import Closed, Event, Outcome, Seen, TaskRecord
from cluster.core.types import Address, Commitment, Timestamp, Wei
from cluster.journal import Assignment, SqlJournal

KEPT_CLOSED = 200


@dataclass(slots=True)
class Ledger:
    """Raises `LeaseLost` from `append` when another coordinator acts.

    `clock` is the network's: what is stored is compared with what the network says.
    """

    journal: SqlJournal
    lease: Lease
    clock: Callable[[], float]
    open: dict[Commitment, TaskRecord]
    closed: deque[TaskRecord]
    outcomes: Counter[Outcome]
    paid: Wei
    slashed: set[Address]
    """Accounts that lost their stake by a task: never joined again by themselves."""
    told: Callable[[TaskRecord], None] = lambda _: None
    """Called with each record that is closed."""
    struck: Callable[[], None] = lambda: None
    """Called for each account that turns out to have lost its stake."""

    @classmethod
    def load(cls, journal: SqlJournal, lease: Lease, clock: Callable[[], float]) -> Ledger:
        records = {record.commitment: record for record in journal.open_records()}
        closed = deque(journal.recent_records(KEPT_CLOSED), maxlen=KEPT_CLOSED)
        outcomes, paid = journal.totals()
        slashed = set(journal.slashed_accounts())
        return cls(journal, lease, clock, records, closed, outcomes, paid, slashed)

    def append(self, task: Commitment, event: Event) -> TaskRecord:
        """Store `event`; on return it survives a crash and the record in memory has it."""
        record = self.journal.append(self.lease, task, event, Timestamp(self.clock()))
        self.open[task] = record
        match event:
            case Seen():
                self._reopen(task)
            case Closed(outcome, payment):
                del self.open[task]
                self.closed.appendleft(replace(record, parameters=None))
                if outcome is Outcome.INVALIDATED:
                    self._strike(record.account)
                self._count(outcome, payment, 1)
                self.told(record)
        return record

    def mark_slashed(self, account: Address) -> None:
        """Store that the account lost its stake, unless that is known."""
        if account not in self.slashed:
            self.journal.mark_slashed(self.lease, account, Timestamp(self.clock()))
            self._strike(account)

    def _strike(self, account: Address) -> None:
        """By its task's end or by an event, whichever is seen first."""
        if account not in self.slashed:
            self.slashed.add(account)
            self.struck()

    def clear_slashed(self, account: Address) -> None:
        """The operator has seen to it: the account may be staked again."""
        self.journal.clear_slashed(self.lease, account)
        self.slashed.discard(account)

    def _reopen(self, task: Commitment) -> None:
        """The network took back that the task had ended: it no longer counts."""
        for record in [each for each in self.closed if each.commitment == task]:
            self.closed.remove(record)
            if record.outcome is not None:
                self._count(record.outcome, record.payment, -1)

    def _count(self, outcome: Outcome, payment: Wei, sign: int) -> None:
        self.outcomes[outcome] += sign
        self.paid = Wei(self.paid + sign * payment)

    def assigned(self) -> tuple[Assignment, ...]:
        """Which accounts stand for which class."""
        return self.journal.assigned(self.lease)

    def of_account(self, account: Address) -> tuple[TaskRecord, ...]:
        return tuple(record for record in self.open.values() if record.account == account)
