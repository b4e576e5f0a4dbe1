"""Which node accounts serve which class of GPU (design.md, "One identity, many GPUs").

One account is one declared GPU on the network, so every class of card has as many joined accounts
as its target says (`cluster.core.capacity`). An account belongs to a class, not to a card. From
what is wanted and what is there, at most one action for each account; the next look decides on the
next. What isn't known, what is on its way, and what is held, is left alone.

    Assign ─▶ Fund ─▶ Join ─▶ (serves) ─▶ Pause ─▶ Resume
                                  │          └──▶ Quit ─▶ Assign to another class
                                  └─ TopUp, UpdateVersion, Sweep
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.core.capacity import Target
from cluster.core.fleet_actions import (
    Assign,
    BringHome,
    FleetAction,
    Fund,
    Join,
    Pause,
    Quit,
    Resume,
    Sweep,
    TopUp,
    UpdateVersion,
)
from cluster.core.node_accounts import (
    NodeAccount,
    balance_of,
    belongs,
    comes,
    goes,
    is_free,
    is_outdated,
    is_refused,
    on_chain,
    serves,
    staked,
    status_of,
)
from cluster.core.types import Address, GpuClass, NodeStatus, Timestamp, Wei


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """`gas_reserve`: what an account must own beyond its stake before it joins; it is topped up to
    `gas_target` when it has less than `gas_low`. `stake_budget`: the stakes of all accounts
    together never exceed it; None for no bound. What an account earns beyond `gas_target` is swept
    to `beneficiary` once it is more than `sweep_above`; None: never."""

    stake: Wei
    gas_reserve: Wei
    gas_low: Wei
    gas_target: Wei
    stake_budget: Wei | None = None
    beneficiary: Address | None = None
    sweep_above: Wei | None = None

    @property
    def most_gas(self) -> int:
        """What an account spends, or needs, that is more than this, isn't for gas."""
        return max(self.stake // 20, self.gas_target)

    @property
    def most_gas_gone(self) -> int:
        """What an account may have been sent for gas within a day, beyond what it spent: one that
        is emptied again and again takes no more than this, and the last payment."""
        return 2 * self.gas_target


@dataclass(frozen=True, slots=True)
class Plan:
    """`actions` by the accounts' index. What stands in the way, in words: `lacks` is the operator's
    to mend, `limits` are his own settings."""

    actions: tuple[FleetAction, ...] = ()
    lacks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(slots=True)
class _Draft:
    """What is left to spend while a plan is made."""

    policy: FleetPolicy
    treasury: Wei | None
    committed: int
    now: Timestamp
    actions: dict[int, FleetAction] = field(default_factory=dict)
    lacks: dict[str, None] = field(default_factory=dict)
    limits: dict[str, None] = field(default_factory=dict)
    refused: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    short: list[GpuClass] = field(default_factory=list)
    """For each account that lacks only its stake's money, its class."""

    def may(self, account: NodeAccount, verb: str) -> bool:
        """Not where it was refused a short while ago; that is noted."""
        there = account.refused.get(verb)
        if there is None or there.again <= self.now:
            return True
        self.refused.setdefault((verb, there.reason), []).append(account.index)
        return False

    def some(self, accounts: Iterable[NodeAccount], verb: str, count: int) -> list[NodeAccount]:
        """The first of them, `count` at most, of which it may be asked."""
        able = (account for account in accounts if self.may(account, verb))
        return list(itertools.islice(able, max(0, count)))

    def refusals(self) -> Iterable[str]:
        for (verb, reason), indexes in self.refused.items():
            which = ", ".join(map(str, indexes))
            yield f"{verb} of account{'s' * (len(indexes) > 1)} {which} is refused: {reason}"

    def has_budget(self) -> bool:
        budget = self.policy.stake_budget
        return budget is None or self.committed + self.policy.stake <= budget

    def affords_stake(self) -> bool:
        if self.has_budget():
            return True
        self.tell_budget()
        return False

    def tell_budget(self) -> None:
        spent = f"{self.committed} of {self.policy.stake_budget} wei"
        self.limits[f"the stake budget is spent, nobody joins: {spent}"] = None

    def pays(self, amount: int, purpose: str) -> bool:
        if self.treasury is None:
            return False
        # The treasury's own transactions cost gas too.
        if amount + self.policy.gas_reserve <= self.treasury:
            self.treasury = Wei(self.treasury - amount)
            return True
        self.lacks[
            f"the treasury has {self.treasury} wei and needs {amount + self.policy.gas_reserve} "
            f"to {purpose}: send it more"
        ] = None
        return False


def plan(
    targets: Mapping[GpuClass, Target],
    accounts: Sequence[NodeAccount],
    policy: FleetPolicy,
    treasury: Wei | None,
    now: Timestamp,
) -> Plan:
    """What to do for the accounts now; classes that aren't in `targets` want nobody, and lose
    nobody. `treasury` is its balance, None while that isn't known."""
    ordered = sorted(accounts, key=lambda account: account.index)
    committed = sum(staked(account, policy.stake) for account in ordered)
    draft = _Draft(policy, treasury, committed, now)
    if policy.stake_budget is not None and committed > policy.stake_budget:
        draft.tell_budget()  # though nobody may want another stake: it was lowered
    staying = [account for account in ordered if not account.retired]
    _assign(draft, targets, staying)
    for gpu_class in sorted(targets, key=lambda each: (-each.vram, each.name)):
        members = [each for each in staying if belongs(each) == gpu_class]
        serving = sum(serves(each) for each in members)
        wanted = targets[gpu_class]
        coming = sum(comes(each) for each in members)
        if serving > wanted.most:
            _pause(draft, members, serving - wanted.most)
        elif serving + coming < wanted.least:
            _wake(draft, members, gpu_class, wanted.least - serving - coming)
    _free_stakes(draft, targets, staying)
    for account in ordered:
        if account.index in draft.actions or account.facts is None or account.left_alone:
            continue
        _tend(draft, account)
        if account.retired and account.index not in draft.actions and is_free(account):
            _send_home(draft, account)
    actions = tuple(draft.actions[index] for index in sorted(draft.actions))
    return Plan(actions, (*draft.lacks, *draft.refusals()), tuple(draft.limits))


def _assign(
    draft: _Draft, targets: Mapping[GpuClass, Target], accounts: Sequence[NodeAccount]
) -> None:
    """New classes: first what the chain says, then the classes that lack an account; where nobody
    is to be had, one leaves a class that has too many."""
    for account in accounts:
        found = on_chain(account)
        if found is not None and found != account.assigned and not account.doubtful:
            draft.actions[account.index] = Assign(account.index, account.address, found)
    held = _held(accounts)
    lacking = [
        gpu_class
        for gpu_class in sorted(targets, key=lambda each: (-each.vram, each.name))
        for _ in range(targets[gpu_class].least - held[gpu_class])
    ]
    fit = [a for a in accounts if is_free(a) and not a.barred and a.index not in draft.actions]
    spare = [a for a in fit if belongs(a) is None]
    surplus = _surplus(targets, held)
    leaving = _leaving(accounts, surplus)
    for gpu_class in lacking:
        if spare:
            account = spare.pop(0)
            draft.actions[account.index] = Assign(account.index, account.address, gpu_class)
            continue
        if leaving:
            leaving -= 1
            continue
        mover = _mover(fit, surplus, draft)
        if mover is None:
            draft.limits[f"{gpu_class.name} lacks an account: raise identity.accounts"] = None
            continue
        _move(draft, mover, gpu_class)


def _held(accounts: Iterable[NodeAccount]) -> Counter[GpuClass]:
    return Counter(
        each for a in accounts if not (a.barred or a.held) and (each := belongs(a)) is not None
    )


def _surplus(
    targets: Mapping[GpuClass, Target], held: Mapping[GpuClass, int]
) -> dict[GpuClass, int]:
    return {each: held[each] - targets.get(each, Target(0, 0)).most for each in held}


def _leaving(
    accounts: Iterable[NodeAccount],
    surplus: dict[GpuClass, int],
    actions: Mapping[int, FleetAction] = MappingProxyType({}),
) -> int:
    """How many are on their way out of a class that has too many, or are told to go by `actions`:
    nobody else leaves for what they leave for. `surplus` is without them afterwards."""
    count = 0
    for account in accounts:
        gpu_class, action = belongs(account), actions.get(account.index)
        if gpu_class is None or account.barred or account.left_alone:
            continue
        told = isinstance(action, Quit)
        away = isinstance(action, Assign) and action.gpu_class != gpu_class
        if told or away or (surplus.get(gpu_class, 0) > 0 and goes(account)):
            surplus[gpu_class] = surplus.get(gpu_class, 0) - 1
            count += not away
    return count


def _free_stakes(
    draft: _Draft, targets: Mapping[GpuClass, Target], accounts: Sequence[NodeAccount]
) -> None:
    """Where neither the budget nor the treasury has another stake, one comes from an account that a
    class has too many: it leaves, and takes its money along."""
    if not draft.short:
        return
    need = draft.policy.stake + draft.policy.gas_reserve
    surplus = _surplus(targets, _held(accounts))
    owning = [
        a
        for a in accounts
        if is_free(a)
        and not a.barred
        and (status_of(a) is not NodeStatus.QUIT or (balance_of(a) >= need and draft.has_budget()))
    ]
    for gpu_class in draft.short[_leaving(accounts, surplus, draft.actions) :]:
        mover = _mover(owning, surplus, draft)
        if mover is None:
            return
        _move(draft, mover, gpu_class)


def _mover(
    fit: Iterable[NodeAccount], surplus: dict[GpuClass, int], draft: _Draft
) -> NodeAccount | None:
    """An account of a class that has too many, if there is one: first those that are out."""
    movable = [
        account
        for account in fit
        if account.index not in draft.actions
        and (gpu_class := belongs(account)) is not None
        and surplus.get(gpu_class, 0) > 0
        and status_of(account) in {NodeStatus.QUIT, NodeStatus.PAUSED}
        and (status_of(account) is NodeStatus.QUIT or draft.may(account, "quit"))
    ]
    movable.sort(key=lambda account: status_of(account) is not NodeStatus.QUIT)
    if not movable:
        return None
    gpu_class = belongs(movable[0])
    if gpu_class is not None:
        surplus[gpu_class] -= 1
    return movable[0]


def _move(draft: _Draft, account: NodeAccount, gpu_class: GpuClass) -> None:
    if status_of(account) is NodeStatus.QUIT:
        draft.actions[account.index] = Assign(account.index, account.address, gpu_class)
    else:
        draft.actions[account.index] = Quit(account.address)


def _pause(draft: _Draft, members: Sequence[NodeAccount], count: int) -> None:
    """So many fewer serve: the free ones first, of those the ones that joined last."""
    able = [
        account
        for account in members
        if account.index not in draft.actions
        and is_free(account)
        and status_of(account) in {NodeStatus.AVAILABLE, NodeStatus.BUSY}
    ]
    able.sort(key=lambda each: (status_of(each) is NodeStatus.BUSY, -each.index))
    for account in draft.some(able, "pause", count):
        draft.actions[account.index] = Pause(account.address)


def _wake(draft: _Draft, members: Sequence[NodeAccount], gpu_class: GpuClass, count: int) -> None:
    """So many more serve: resuming costs no stake, so the paused go first; then those that can pay
    their own."""
    need = draft.policy.stake + draft.policy.gas_reserve
    able = [a for a in members if a.index not in draft.actions and is_free(a) and not a.barred]
    paused = [a for a in able if status_of(a) is NodeStatus.PAUSED]
    out = [a for a in able if status_of(a) is NodeStatus.QUIT and a.rejoin_at <= draft.now]
    resumed = draft.some(paused, "resume", count)
    for account in resumed:
        draft.actions[account.index] = Resume(account.address)
    count -= len(resumed)
    rich = [account for account in out if balance_of(account) >= need]
    for account in draft.some(rich, "join", count):
        if not draft.affords_stake():
            draft.short += [gpu_class] * count
            return
        draft.actions[account.index] = Join(account.address, gpu_class)
        draft.committed += draft.policy.stake
        count -= 1
    poor = [account for account in out if balance_of(account) < need]
    # Another one's stake would lie there too: the network refuses it for all of them.
    tried = [account for account in members if is_refused(account, draft.now)]
    if tried:
        poor = [a for a in poor if a in tried and draft.may(a, "join")]
    _fund(draft, draft.some(poor, "fund", count), gpu_class)


def _fund(draft: _Draft, accounts: Sequence[NodeAccount], gpu_class: GpuClass) -> None:
    policy = draft.policy
    for done, account in enumerate(accounts):
        lack = policy.stake + policy.gas_target - balance_of(account)
        if not draft.affords_stake() or not draft.pays(lack, f"fund account {account.index}"):
            if draft.treasury is not None:
                draft.short += [gpu_class] * (len(accounts) - done)
            return
        draft.actions[account.index] = Fund(account.address, Wei(lack))
        draft.committed += policy.stake


def _tend(draft: _Draft, account: NodeAccount) -> None:
    """Gas for those that serve or are paused, and whose transactions wait for it; what they say of
    themselves; earnings to the beneficiary."""
    policy, balance = draft.policy, balance_of(account)
    joined = status_of(account) not in {None, NodeStatus.QUIT}
    lack = policy.gas_target - balance if joined and balance < policy.gas_low else 0
    # More than gas would be its stake, which isn't where it was.
    if 0 < account.lacks <= policy.most_gas and not account.barred:
        lack = max(lack, policy.gas_target + account.lacks)
    # Also while something of its own is on its way: that may be waiting for just this.
    if lack and not account.paying:
        # What it has yet isn't gone.
        has = balance if joined else max(0, balance - policy.stake)
        if account.gas_gone - has > policy.most_gas_gone:
            draft.lacks[
                f"account {account.index} was sent {account.gas_gone} wei more for gas in a day "
                "than it spent, and has none: does somebody else use its key? It gets no more today"
            ] = None
            return
        if draft.may(account, "gas") and draft.pays(lack, f"top up account {account.index}"):
            draft.actions[account.index] = TopUp(account.address, Wei(lack))
        return
    if account.moving or account.retired:
        return
    if is_outdated(account) and draft.may(account, "version"):
        draft.actions[account.index] = UpdateVersion(account.address)
    elif policy.sweep_above is not None:
        _sweep(draft, account, policy.sweep_above)


def _sweep(draft: _Draft, account: NodeAccount, above: Wei) -> None:
    policy, balance = draft.policy, balance_of(account)
    joined = status_of(account) not in {None, NodeStatus.QUIT}
    if policy.beneficiary is None or policy.beneficiary == account.address:
        return
    own = policy.gas_target + (0 if joined else policy.stake)
    if balance - own > above and draft.may(account, "sweep"):
        amount = Wei(balance - own)
        draft.actions[account.index] = Sweep(account.address, policy.beneficiary, amount)


def _send_home(draft: _Draft, account: NodeAccount) -> None:
    """It finishes what it has, leaves, and gives back what it owns; what is less than its gas for
    a while isn't worth the gas."""
    status, spare = status_of(account), balance_of(account) - draft.policy.gas_reserve
    if status in {NodeStatus.AVAILABLE, NodeStatus.BUSY}:
        if draft.may(account, "pause"):
            draft.actions[account.index] = Pause(account.address)
    elif status is NodeStatus.PAUSED:
        if draft.may(account, "quit"):
            draft.actions[account.index] = Quit(account.address)
    elif status is NodeStatus.QUIT and spare >= draft.policy.gas_low and draft.may(account, "home"):
        draft.actions[account.index] = BringHome(account.address, Wei(spare))
