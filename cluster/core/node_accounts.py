"""A node account, and what is asked of one: pure, and nothing here decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.core.ports import Refusal
from cluster.core.standing import Place, place_of
from cluster.core.types import AccountFacts, Address, GpuClass, NodeStatus, Timestamp, Wei


@dataclass(frozen=True, slots=True)
class NodeAccount:
    """A node account: its place in the key's derivation, its class, and the network's facts.

    `facts` is None until they were read. `moving`: something of ours concerning it is on its way,
    or done and not yet in the facts; `paying`: that is money for it. `barred`: it is not to be
    joined (slashed), or left alone altogether when `held`. `doubtful`: found where nobody put it,
    and not explained yet: left alone too, but it may serve. `rejoin_at`: not to be joined before.
    `retired`: it leaves for good, and what it owns goes back to the treasury.
    """

    index: int
    address: Address
    assigned: GpuClass | None
    facts: AccountFacts | None
    moving: bool = False
    paying: bool = False
    barred: bool = False
    held: bool = False
    rejoin_at: Timestamp = Timestamp(0)
    retired: bool = False
    doubtful: bool = False
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    """By the verb, as `Refusal` names it."""
    lacks: Wei = Wei(0)
    """For a transaction of its own that waits for it."""
    gas_gone: Wei = Wei(0)
    """What it was sent for gas within a day, beyond what its transactions cost in that time."""

    @property
    def left_alone(self) -> bool:
        return self.held or self.doubtful


def on_chain(account: NodeAccount) -> GpuClass | None:
    """The class the account is joined with; None when it isn't joined, or it isn't known."""
    facts = account.facts
    return None if facts is None or facts.status is NodeStatus.QUIT else facts.gpu_class


def belongs(account: NodeAccount) -> GpuClass | None:
    return on_chain(account) or account.assigned


def status_of(account: NodeAccount) -> NodeStatus | None:
    return None if account.facts is None else account.facts.status


def serves(account: NodeAccount) -> bool:
    """It takes tasks, or may for all we know; an account that is joining, or being paid for it,
    counts too."""
    if account.facts is None:
        return account.assigned is not None
    place = place_of(account.facts.status)
    joins = account.moving and place is Place.OUT
    return place is Place.SERVING or (joins and not account.barred and not account.held)


def comes(account: NodeAccount) -> bool:
    """It doesn't serve as far as was seen, but nobody is woken in its place: it may serve yet, or
    can be woken itself in a moment."""
    if account.facts is None or account.held or account.barred or serves(account):
        return False
    pausing = account.facts.status is NodeStatus.PENDING_PAUSE
    paused = account.facts.status is NodeStatus.PAUSED
    return account.doubtful or pausing or (paused and account.moving)


def is_free(account: NodeAccount) -> bool:
    """Something may be done for it now."""
    return account.facts is not None and not account.moving and not account.left_alone


def staked(account: NodeAccount, stake: Wei) -> int:
    """What is bound for it of the stakes, or soon will be; `stake` is what each costs."""
    facts = account.facts
    if facts is None:
        return stake
    if facts.status is NodeStatus.QUIT:
        joins = (account.moving or account.doubtful) and not account.barred
        return stake if joins else 0
    return max(facts.stake, stake)


def goes(account: NodeAccount) -> bool:
    """It leaves its class, or is told to."""
    paused = status_of(account) is NodeStatus.PAUSED
    return status_of(account) is NodeStatus.PENDING_QUIT or (account.moving and paused)


def is_outdated(account: NodeAccount) -> bool:
    leaving = {None, NodeStatus.QUIT, NodeStatus.PENDING_QUIT}
    facts = account.facts
    return facts is not None and facts.outdated and facts.status not in leaving


def is_refused(account: NodeAccount, now: Timestamp) -> bool:
    """It is to join, and the network won't have it."""
    out = status_of(account) is NodeStatus.QUIT and account.rejoin_at <= now
    return out and "join" in account.refused and not (account.barred or account.left_alone)


def balance_of(account: NodeAccount) -> int:
    return 0 if account.facts is None else account.facts.balance
