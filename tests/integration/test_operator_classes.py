"""Accounts follow the cards of their class, with a whole operator: they rest when these leave, wake
when they are back, and serve another class when they stay away.

What an account told the registry is read from the chain's blocks, so an account that left and
joined again isn't taken for one that only rested.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
from web3 import Web3

from cluster.core.types import Commitment, GigaBytes, GpuClass, GpuState
from cluster.status import AccountStatus, GpuStatus, Status
from devnet.application import TaskReport
from devnet.compile import load as contract
from devnet.tasks import TaskSpec
from tests.integration.contracts_world import STAKE
from tests.integration.operator_start import late_node
from tests.integration.operator_world import (
    CARDS,
    LATE_CARD,
    TEST_SECONDS,
    OperatorWorld,
    task,
)

pytestmark = pytest.mark.timeout(TEST_SECONDS)
PAIR = GpuClass(f"{CARDS[0].name}+docker", CARDS[0].vram)
"""The class with two cards."""
OTHER_CARD = GpuClass("NVIDIA T4+docker", GigaBytes(16))
"""A second class that no node has at first; no account is left for it."""
MOST_TRIES = 20


@pytest.fixture(autouse=True)
async def serving(operator: OperatorWorld) -> None:
    await operator.until_serving()


def named(name: str, gpu_class: GpuClass) -> TaskSpec:
    """A task that asks for the class by its name."""
    vram = int(gpu_class.vram)
    return task(name, required_gpu=gpu_class.name, required_gpu_vram=vram)


# --- what is seen ---------------------------------------------------------------------------------


def of_class(status: Status, gpu_class: GpuClass) -> list[AccountStatus]:
    return [
        each
        for each in status.accounts
        if each.gpu_class is not None
        and (each.gpu_class.name, each.gpu_class.vram) == (gpu_class.name, gpu_class.vram)
    ]


def cards_of(status: Status, gpu_class: GpuClass) -> list[GpuStatus]:
    return [g for g in status.gpus if (g.name, g.vram) == (gpu_class.name, gpu_class.vram)]


async def until_statuses(operator: OperatorWorld, wanted: dict[str, str]) -> None:
    """Wait until the accounts have these statuses, at one moment."""

    def holds(status: Status) -> bool:
        found = {each.address: each.status for each in status.accounts}
        return all(found[address] == name for address, name in wanted.items())

    await operator.until_status(holds, f"accounts are {wanted}")


@contextlib.asynccontextmanager
async def with_card(
    operator: OperatorWorld, gpu_class: GpuClass
) -> AsyncIterator[tuple[GpuStatus, AccountStatus]]:
    """While a node with one card of the class is there: the card, and the account that serves."""
    with late_node(gpu_class) as (node, vanish):

        def found(status: Status) -> tuple[GpuStatus, AccountStatus] | None:
            accounts = [a for a in of_class(status, gpu_class) if a.status == "available"]
            for gpu in cards_of(status, gpu_class):
                if gpu.ray_node == node and gpu.state is GpuState.READY and accounts:
                    (account,) = accounts
                    return gpu, account
            return None

        yield await operator.until_status(found, f"a {gpu_class.name} and its account serve")
        await asyncio.to_thread(vanish)


@dataclass(frozen=True, slots=True)
class Told:
    """What an account told the registry, as it was mined."""

    function: str
    block: int


class Registry:
    """The Node contract, at any block."""

    def __init__(self, operator: OperatorWorld) -> None:
        self._web3 = operator.web3
        self._place = Web3.to_checksum_address(operator.devnet.deployment.node)
        self._contract = self._web3.eth.contract(self._place, abi=contract("Node").abi)

    def head(self) -> int:
        return self._web3.eth.block_number

    def stake(self, account: str, block: int) -> int:
        place = Web3.to_checksum_address(account)
        asked = self._contract.functions.getStakedAmount(place)
        return int(asked.call(block_identifier=block))

    def gpu_class(self, account: str, block: int) -> GpuClass:
        place = Web3.to_checksum_address(account)
        _, _, (name, vram), *_ = self._contract.functions.getNodeInfo(place).call(
            block_identifier=block
        )
        return GpuClass(name, GigaBytes(vram))

    def earned(self, account: str, block: int) -> int:
        """By how much its balance grew in the block, but for the gas of its own transactions."""
        place, eth = Web3.to_checksum_address(account), self._web3.eth
        fees = sum(self._fee(each) for each in self._mined(block) if each["from"] == place)
        return eth.get_balance(place, block) - eth.get_balance(place, block - 1) + fees

    def sent_to(self, account: str, since: int) -> int:
        """Plain payments to the account in the blocks after that one."""
        place = Web3.to_checksum_address(account)
        blocks = range(since + 1, self.head() + 1)
        mined = itertools.chain.from_iterable(map(self._mined, blocks))
        return sum(each["value"] for each in mined if each["to"] == place)

    def told(self, account: str, since: int) -> list[Told]:
        """How it joined, rested, woke and left in the blocks after that one."""
        place, found = Web3.to_checksum_address(account), []
        for number in range(since + 1, self.head() + 1):
            for each in self._mined(number):
                if each["from"] != place or each["to"] != self._place:
                    continue
                function, _ = self._contract.decode_function_input(each["input"])
                assert self._receipt(each)["status"] == 1, f"{function.fn_name} was refused"
                if function.fn_name in {"join", "quit", "pause", "resume"}:
                    found.append(Told(function.fn_name, number))
        return found

    def words(self, account: str, since: int) -> list[str]:
        return [each.function for each in self.told(account, since)]

    def _mined(self, block: int) -> list[Any]:
        found = self._web3.eth.get_block(block, full_transactions=True)["transactions"]
        return cast(list[Any], found)

    def _receipt(self, transaction: Any) -> Any:
        return self._web3.eth.get_transaction_receipt(transaction["hash"])

    def _fee(self, transaction: Any) -> int:
        receipt = self._receipt(transaction)
        return int(receipt["gasUsed"] * receipt["effectiveGasPrice"])


async def assert_served_by(
    operator: OperatorWorld, report: TaskReport, card: GpuStatus, account: AccountStatus
) -> None:
    """The network gave the task to the account, the card computed it, and it was paid once."""
    events = await operator.assert_paid_once(report)
    assert operator.gpus_of(events) == [card.gpu_id]
    assert report.node.lower() == account.address.lower()
    ((score, _),) = operator.score_transactions(report.commitment)
    sender = operator.web3.eth.get_transaction(cast(Any, score))["from"]
    assert sender.lower() == account.address.lower()


# --- tests ----------------------------------------------------------------------------------------


async def test_accounts_rest_and_wake_with_their_cards(operator: OperatorWorld) -> None:
    """Of two cards the idle one leaves first, then the one that computes: their processes die and
    come up no more while the gate is closed."""
    chain = Registry(operator)
    sent, card, (free, busy) = await hold_with_the_later_account(operator)
    begun = chain.head()
    before = await operator.until_status(lambda status: status, "it answers")
    (idle,) = (g for g in cards_of(before, PAIR) if g.gpu_id != card.gpu_id)

    os.kill((await operator.gpu_report(idle.gpu_id)).pid, signal.SIGKILL)
    # The one that joined last would go first, if it weren't busy.
    await until_statuses(operator, {free: "paused", busy: "busy"})
    assert chain.words(busy, begun) == []
    os.kill((await operator.gpu_report(card.gpu_id)).pid, signal.SIGKILL)
    await until_statuses(operator, {free: "paused", busy: "pending_pause"})

    operator.gate.open()
    (report,) = await sent.ended()
    await operator.assert_paid_once(report)
    assert report.node.lower() == busy.lower(), "it finished what it had"
    await until_statuses(operator, {free: "available", busy: "available"})
    for account in (free, busy):
        assert chain.words(account, begun) == ["pause", "resume"]
        assert chain.stake(account, chain.head()) == STAKE
    (report,) = await operator.send(named("awake", PAIR)).ended()
    await operator.assert_paid_once(report)


async def hold_with_the_later_account(
    operator: OperatorWorld,
) -> tuple[Any, GpuStatus, tuple[str, str]]:
    """A task of the pair in the middle, held by the gate, that the network gave to the account with
    the higher index; the card, and both accounts by their index."""

    def commitment_of(sent: Any, name: str) -> Callable[[], Commitment | None]:
        return lambda: sent.commitments.get(name)

    for number in range(MOST_TRIES):
        name = f"held-{number}"
        operator.gate.close()
        sent = operator.send(named(name, PAIR))
        card = await operator.computing(commitment_of(sent, name))

        def found(status: Status) -> tuple[list[str], list[str]] | None:
            pair = of_class(status, PAIR)
            busy = [each.address for each in pair if each.status == "busy"]
            return ([each.address for each in pair], busy) if busy else None

        pair, (busy,) = await operator.until_status(found, "an account is seen to be busy")
        first, last = pair
        if busy == last:
            return sent, card, (first, last)
        operator.gate.open()
        (report,) = await sent.ended()
        await operator.assert_paid_once(report)
    raise AssertionError(f"the network never chose the account in {MOST_TRIES} tries")


async def test_an_account_waits_for_its_class_to_come_back(operator: OperatorWorld) -> None:
    chain = Registry(operator)
    async with with_card(operator, LATE_CARD) as (card, account):
        (report,) = await operator.send(named("before", LATE_CARD)).ended()
        await assert_served_by(operator, report, card, account)
        begun = chain.head()
    await until_statuses(operator, {account.address: "paused"})
    async with with_card(operator, LATE_CARD) as (other_card, same):
        assert other_card.ray_node != card.ray_node
        assert same.address == account.address
        assert chain.words(account.address, begun) == ["pause", "resume"]
        (report,) = await operator.send(named("after", LATE_CARD)).ended()
        await assert_served_by(operator, report, other_card, same)


async def test_an_account_moves_to_the_class_that_has_cards(operator: OperatorWorld) -> None:
    chain = Registry(operator)
    async with with_card(operator, LATE_CARD) as (_, account):
        address = account.address
        joined = chain.head()
        assert chain.gpu_class(address, joined) == LATE_CARD
        assert chain.stake(address, joined) == STAKE
    await until_statuses(operator, {address: "paused"})
    before = await operator.until_status(lambda status: status, "it answers")

    async with with_card(operator, OTHER_CARD) as (card, moved):
        assert moved.address == address
        paused, left, back = chain.told(address, joined)
        assert [each.function for each in (paused, left, back)] == ["pause", "quit", "join"]
        # The stake came back, and the same money was put down again.
        assert chain.stake(address, left.block - 1) == STAKE
        assert chain.stake(address, left.block) == 0
        assert chain.earned(address, left.block) == STAKE
        assert chain.earned(address, back.block) == -STAKE
        assert chain.stake(address, back.block) == STAKE
        assert chain.sent_to(address, joined) < STAKE // 20, "at most some gas"
        assert chain.gpu_class(address, back.block - 1) == GpuClass("", GigaBytes(0))
        assert chain.gpu_class(address, chain.head()) == OTHER_CARD

        # Nobody else moved, and the account serves as what it is now.
        after = await operator.until_status(lambda status: status, "it answers")
        others = {a.address: a.gpu_class for a in before.accounts if a.address != address}
        assert {a.address: a.gpu_class for a in after.accounts if a.address != address} == others
        (report,) = await operator.send(named("moved", OTHER_CARD)).ended()
        await assert_served_by(operator, report, card, moved)
