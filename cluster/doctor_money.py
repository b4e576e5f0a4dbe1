"""The doctor's look at stakes and balances: has the treasury what the fleet would ask of it?

What is asked is the fleet's own rule (`cluster.core.fleet`), for as many accounts as there are
cards, slots and a stake budget for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.chain.network import Contracts
from cluster.chain.rpc import LATEST, Call, Reverted, Rpc
from cluster.checks import Check, fail, ok, warn
from cluster.config import WEI_PER_CNX, Config
from cluster.core.errors import ChainError
from cluster.core.types import Address, GigaBytes, GpuClass, NodeStatus, Wei
from cluster.core.wording import counted
from cluster.identity import TREASURY, Identity

LOOKED_AT = 64
"""Accounts whose stakes and balances are read, at most."""
_ANY_CARD = GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
_PLENTY = hex(10**30)


@dataclass(frozen=True, slots=True)
class Account:
    index: int
    address: Address
    status: NodeStatus
    balance: Wei


async def check_money(
    config: Config, rpc: Rpc, identity: Identity, cards: int | None, used: Sequence[int] = ()
) -> list[Check]:
    """`cards` of the cluster, None where they aren't known; `used`: indices of accounts that were
    ever assigned."""
    try:
        return await _check_money(config, rpc, identity, cards, used)
    except ChainError as error:
        words = f"the accounts can't be read: {error}"
        return [fail("balances", words, "see what is said of the chain; then ask again")]


async def _check_money(
    config: Config, rpc: Rpc, identity: Identity, cards: int | None, used: Sequence[int]
) -> list[Check]:
    treasury, most = identity.address(TREASURY), config.identity.accounts
    tended = [*range(1, min(most, LOOKED_AT) + 1), *(each for each in used if each > most)]
    has, accounts = await asyncio.gather(
        rpc.balance(treasury, LATEST),
        asyncio.gather(*(_account(config, rpc, i, identity.address(i)) for i in tended)),
    )
    found = [
        balances(config, treasury, has, [each for each in accounts if each.index <= most], cards),
        beyond(config, accounts),
        await check_stake(config, rpc, identity, accounts),
    ]
    return [check for check in found if check is not None]


async def _account(config: Config, rpc: Rpc, index: int, address: Address) -> Account:
    contracts = Contracts.at(rpc, *config.network.contracts.addresses)
    block = (await rpc.head()).number
    info, balance = await asyncio.gather(
        contracts.node.info(address, block), rpc.balance(address, LATEST)
    )
    return Account(index, address, info.status, balance)


def wanted(config: Config, cards: int | None) -> int:
    """How many accounts may need money. With `auto` slots: one for each card at least."""
    fleet, found = config.fleet, config.identity.accounts
    if cards is not None:
        found = min(found, cards * (1 if fleet.slots_per_gpu == "auto" else fleet.slots_per_gpu))
    if fleet.stake_budget is not None:
        found = min(found, fleet.stake_budget // config.network.stake)
    return found


def needs(config: Config, account: Account) -> int:
    """What the fleet would send the account, in wei."""
    fleet, stake, has = config.fleet, config.network.stake, account.balance
    if account.status is NodeStatus.QUIT:
        return 0 if has >= stake + fleet.gas_reserve else stake + fleet.gas_target - has
    return 0 if has >= fleet.gas_low else fleet.gas_target - has


def balances(
    config: Config, treasury: Address, has: Wei, accounts: Sequence[Account], cards: int | None
) -> Check:
    """The treasury against what the accounts may still need of it."""
    most = min(wanted(config, cards), len(accounts))
    asked = sorted(needs(config, each) for each in accounts)[:most]
    # The treasury's own transactions cost gas too.
    needed = [sum(asked[:count]) for count in range(1, most + 1)]
    needed = [each + config.fleet.gas_reserve if each else 0 for each in needed]
    words = f"the treasury {treasury} has {_cnx(has)} CNX"
    if not needed or has >= needed[-1]:
        return ok(
            "balances", f"{words}; {counted(most, 'account')} may need {_cnx(sum(asked))} more"
        )
    some = sum(each <= has for each in needed)
    return warn(
        "balances",
        f"{words}, enough for {some} of {most} accounts",
        f"send it {_cnx(needed[-1] - has)} CNX, or say with fleet.stake_budget that fewer are "
        "meant to be joined",
    )


def _cnx(wei: int) -> str:
    return f"{wei / WEI_PER_CNX:.9g}"


def beyond(config: Config, accounts: Sequence[Account]) -> Check | None:
    """Accounts with a stake that the configuration has no more."""
    most = config.identity.accounts
    joined = [
        f"account {each.index} ({each.address}) is joined"
        for each in accounts
        if each.index > most and each.status is not NodeStatus.QUIT
    ]
    if not joined:
        return None
    words = f"{'; '.join(joined)}, and identity.accounts is {most}"
    mend = "raise identity.accounts to keep them: else they quit, and their stakes come home"
    return warn("accounts", words, mend)


async def check_stake(
    config: Config, rpc: Rpc, identity: Identity, accounts: Sequence[Account]
) -> Check | None:
    """Whether the contract would take a join with this stake: it is simulated, with money that the
    account needn't have. None where nobody is out, or the endpoint can't do that."""
    out = next((each for each in accounts if each.status is NodeStatus.QUIT), None)
    if out is None:
        return None
    node = Contracts.at(rpc, *config.network.contracts.addresses).node
    key, stake = identity.public_key(out.address), config.network.stake
    data = node.join(_ANY_CARD, config.network.version, key, ())
    call = Call(node.address, data, out.address, stake).fields()
    try:
        await rpc.request("eth_call", call, LATEST, {out.address: {"balance": _PLENTY}})
    except Reverted as refused:
        words = f"a join with {_cnx(stake)} CNX would be refused: {refused.reason}"
        return fail("stake", words, "see network.stake; it is what one account needs to be joined")
    except ChainError:
        return None
    return ok("stake", f"a join with {_cnx(stake)} CNX would be taken")
