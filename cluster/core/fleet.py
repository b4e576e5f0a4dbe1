"""Which node accounts serve which class of GPU (design.md, "One identity, many GPUs").

One account is one declared GPU on the network, so every class of card wants as many joined
accounts as it has cards. An account belongs to a class, not to a card. The plan only ever adds: it
pauses and quits nothing, and what it doesn't know it doesn't touch. One action per account and
turn; the next look decides on the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.core.types import AccountFacts, Address, GpuClass, NodeStatus, Wei


@dataclass(frozen=True, slots=True)
class NodeAccount:
    """A node account: its place in the key's derivation, its class, and the network's facts.

    `facts` is None until they were read.
    """

    index: int
    address: Address
    assigned: GpuClass | None
    facts: AccountFacts | None


@dataclass(frozen=True, slots=True)
class Assign:
    """Write down which class the account belongs to, before anything is done with it."""

    index: int
    address: Address
    gpu_class: GpuClass


@dataclass(frozen=True, slots=True)
class Join:
    address: Address
    gpu_class: GpuClass


@dataclass(frozen=True, slots=True)
class Resume:
    address: Address


FleetAction = Assign | Join | Resume


def _on_chain(account: NodeAccount) -> GpuClass | None:
    """The class the account is joined with; None when it isn't joined, or it isn't known."""
    facts = account.facts
    return None if facts is None or facts.status is NodeStatus.QUIT else facts.gpu_class


def _belongs(account: NodeAccount) -> GpuClass | None:
    return _on_chain(account) or account.assigned


def _idle(account: NodeAccount) -> bool:
    """Known to be quit or paused: it takes no task until it joins or resumes."""
    facts = account.facts
    return facts is not None and facts.status in {NodeStatus.QUIT, NodeStatus.PAUSED}


def _assignments(
    pool: Mapping[GpuClass, int], accounts: Sequence[NodeAccount]
) -> dict[int, GpuClass]:
    """New classes by account index: first what the chain says, then the classes that lack one."""
    new = {
        account.index: chain_class
        for account in accounts
        if (chain_class := _on_chain(account)) is not None and chain_class != account.assigned
    }
    held = Counter(map(_belongs, accounts))
    spare = [a.index for a in accounts if a.facts is not None and _belongs(a) is None]
    lacking = [
        gpu_class
        for gpu_class in sorted(pool, key=lambda c: (-c.vram, c.name))
        for _ in range(pool[gpu_class] - held[gpu_class])
    ]
    return new | dict(zip(spare, lacking, strict=False))


def _wake(account: NodeAccount, gpu_class: GpuClass, needed: Wei) -> FleetAction | None:
    """What makes an idle account take tasks; None when it can't pay the stake."""
    facts = account.facts
    if facts is None or not _idle(account):
        return None
    if facts.status is NodeStatus.PAUSED:
        return Resume(account.address)
    return Join(account.address, gpu_class) if facts.balance >= needed else None


def plan(
    pool: Mapping[GpuClass, int],
    accounts: Sequence[NodeAccount],
    stake: Wei,
    gas_reserve: Wei,
) -> tuple[FleetAction, ...]:
    """What to do for the accounts now, by index; `pool` counts the cards of each class.

    An account whose facts are unknown may well be serving, so it takes up a card of its class.
    """
    ordered = sorted(accounts, key=lambda account: account.index)
    new = _assignments(pool, ordered)
    actions: dict[int, FleetAction] = {
        account.index: Assign(account.index, account.address, new[account.index])
        for account in ordered
        if account.index in new
    }
    room = Counter(pool)
    room.subtract(c for a in ordered if not _idle(a) and (c := _belongs(a)) is not None)
    # Resuming costs no stake, so the paused go first.
    for account in sorted(ordered, key=lambda a: _on_chain(a) is None):
        gpu_class = _belongs(account)
        if gpu_class is None or account.index in actions or room[gpu_class] <= 0:
            continue
        action = _wake(account, gpu_class, Wei(stake + gas_reserve))
        if action is not None:
            actions[account.index] = action
            room[gpu_class] -= 1
    return tuple(actions[index] for index in sorted(actions))
