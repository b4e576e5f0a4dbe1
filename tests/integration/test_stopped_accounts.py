"""What stops an account, with a whole operator on a real chain: a slash and somebody else who uses
its key, until its operator has seen to it; tasks that ran out, for a while.

Others count the operator's slashes (test_serve), so this comes after them.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from eth_account import Account
from eth_account.signers.local import LocalAccount
from prometheus_client.parser import text_string_to_metric_families
from web3 import Web3

from actors.fleet import FLEET_SECONDS
from cluster.core.record import Closed, Outcome, ResultStored, Seen
from cluster.core.standing import FIRST_REJOIN_SECONDS
from cluster.core.types import GpuState
from cluster.status import Status
from devnet.compile import load as contract
from tests.integration.contracts_world import STAKE
from tests.integration.operator_start import BLOCK_SECONDS
from tests.integration.operator_world import (
    ACCOUNTS,
    CARDS,
    TEST_SECONDS,
    OperatorWorld,
    answer_of,
    task,
)
from tests.integration.process_memory import secrets
from tests.integration.test_operator_fleet import cli, restart

pytestmark = pytest.mark.timeout(TEST_SECONDS)
GROUP = frozenset({"EndGroupSuccess", "EndGroupRefund", "EndInvalidated"})
ABORTED = frozenset({"EndAborted"})
LONE = CARDS[1]
"""Of this class there is one card."""


async def test_a_slashed_account_stays_out_until_it_is_cleared(operator: OperatorWorld) -> None:
    await operator.until_serving()
    before = await operator.until_status(lambda each: each, "it answers")
    cards = {each.gpu_id: each.uuid for each in before.gpus}
    odd = before.gpus[0].gpu_id
    classes = {a.address: a.gpu_class for a in before.accounts if a.status == "available"}
    assert len(classes) >= 3

    # One of the group on each card.
    operator.gate.close()
    operator.oddity.of(odd)
    try:
        sent = operator.send(task("odd", seed=91, group=True, expected_end=GROUP))

        def all_compute(status: Status) -> bool:
            busy = [gpu for gpu in status.gpus if gpu.task is not None and (gpu.step or 0) > 0]
            return len(busy) == 3

        await operator.until_status(all_compute, "each card computes one of the three")
        operator.gate.open()
        reports = await sent.ended()
    finally:
        operator.gate.open()
        operator.oddity.end()
    ends = {report.actual_end: report for report in reports}
    assert set(ends) == GROUP
    lost = ends["EndInvalidated"]

    # Its stake is gone, its story and what it computed are kept, and it is told.
    events = await operator.closed(lost.commitment)
    assert events[-1] == Closed(Outcome.INVALIDATED, events[-1].payment)  # type: ignore[union-attr]
    assert operator.gpus_of(events) == [odd]
    assert any(isinstance(event, ResultStored) for event in events)

    (account,) = (each.account for each in events if isinstance(each, Seen))
    kind = classes[account]
    assert kind is not None

    def stopped(status: Status) -> bool:
        """Its class rests: whoever else is of it has paused."""
        (there,) = (each for each in status.fleet.classes if each.name == kind.name)
        states = {each.address: each.status for each in status.accounts if each.address in classes}
        out = states.pop(account) == "quit"
        mates = {state for address, state in states.items() if classes[address] == kind}
        return there.stopped and out and mates <= {"paused"}

    await operator.until_status(stopped, "the account is out, and its class rests")
    status = await operator.until_status(lambda each: each, "it answers")
    assert status.totals.slashed == before.totals.slashed + 1
    assert any(f"account {account} was slashed" in problem for problem in status.problems)
    told = {each for each in status.problems if lost.commitment in each}
    assert [each for each in told if "what it computed is in" in each]
    (blamed,) = (each for each in told if "is in quarantine" in each)
    assert blamed.endswith(f"crynux-cluster gpus clear {cards[odd]}")
    states = {each.gpu_id: each.state for each in status.gpus}
    assert states.pop(odd) is GpuState.QUARANTINED, "it computes for no other account either"
    assert GpuState.QUARANTINED not in states.values()
    assert not status.missing, "the other class serves"
    story = (await operator.get(f"/v1/tasks/{lost.commitment}")).json()
    assert story["outcome"] == "EndInvalidated"
    assert [each["gpu"] for each in story["attempts"]] == [odd]

    async def counted() -> bool:
        wanted = f"\ncrynux_slashes_total {before.totals.slashed + 1}.0"
        return wanted in (await operator.get("/metrics")).text

    await operator.until(counted, "the metrics count it")

    # Neither applying the plan nor a new coordinator brings it back.
    code, out, error = await cli(operator, "fleet", "apply")
    assert code == 0, error
    code, out, error = await cli(operator, "fleet", "plan")
    assert code == 0, error
    assert f"{kind.name} ({kind.vram} GB): " in out
    assert ", stopped" in out
    await restart(operator)
    await plans_pass(operator)
    assert stopped(await operator.until_status(lambda each: each, "it answers"))

    code, out, error = await cli(operator, "fleet", "clear", account)
    assert code == 0, error
    assert f"{account} is cleared" in out
    code, out, error = await cli(operator, "gpus", "clear", cards[odd])
    assert code == 0, error
    await operator.until_serving()

    # It may serve again, or another that was assigned to its class has taken its place.
    await operator.until_status(lambda status: not status.problems, "nothing is wrong any more")
    (report,) = await operator.send(task("after-it", seed=92)).ended()
    await operator.assert_paid_once(report)


async def test_an_account_that_somebody_else_robs_is_held(operator: OperatorWorld) -> None:
    await operator.until_serving()
    status = await operator.until_status(lambda each: each, "it answers")
    ours = next(each for each in status.accounts if each.status == "available")
    assert operator.config.identity.seed_file is not None
    phrase = operator.config.identity.seed_file.read_text().strip()
    key = Account.from_key(secrets(phrase, ACCOUNTS)[f"key {ours.index}"])
    assert key.address == ours.address
    await asyncio.to_thread(rob, operator, key)

    def held(status: Status) -> bool:
        there = next(each for each in status.accounts if each.address == ours.address)
        told = [each for each in status.problems if ours.address in each]
        return there.status == "quit" and bool(told)

    await operator.until_status(held, "it is told, and left alone")
    await restart(operator)
    await plans_pass(operator)
    assert held(await operator.until_status(lambda each: each, "it answers"))
    code, out, error = await cli(operator, "fleet", "apply")
    assert code == 0, error
    await operator.until_serving()  # another has taken its place
    assert held(await operator.until_status(lambda each: each, "it answers"))

    code, out, error = await cli(operator, "fleet", "clear", ours.address)
    assert code == 0, error
    assert f"{ours.address} is cleared" in out
    await operator.until_serving()
    await operator.until_status(lambda status: not status.problems, "nothing is wrong any more")
    (report,) = await operator.send(task("after-that", seed=93)).ended()
    await operator.assert_paid_once(report)


async def test_a_kicked_account_waits_and_joins_again(operator: OperatorWorld) -> None:
    await operator.until_serving()
    before = await operator.until_status(lambda each: each, "it answers")
    (ours,) = (
        each
        for each in before.accounts
        if each.gpu_class is not None
        and each.gpu_class.vram == LONE.vram
        and each.status == "available"
    )
    # Nobody is to take its place meanwhile.
    spares = [each.address for each in before.accounts if each.status == "quit"]
    for spare in spares:
        code, _, error = await cli(operator, "fleet", "quit", spare)
        assert code == 0, error

    counted = await kick_outs(operator)
    # Its tasks run out, one after the other, until the network has enough of it.
    begun = operator.web3.eth.block_number
    tried = 0
    while not kicks(operator, ours.address, begun):
        tried += 1
        assert tried <= 3
        never = task(
            f"never-{tried}",
            min_vram=int(LONE.vram),
            upload=False,
            timeout=10,
            expected_end=ABORTED,
        )
        (report,) = await operator.send(never).ended()
        assert report.actual_end == "EndAborted"

    # It is out, with its stake; that is told and counted, once, and lasts over a restart.
    waits = f"account {ours.address} was kicked out once; it joins again in "

    def waiting(status: Status) -> bool:
        there = next(each for each in status.accounts if each.address == ours.address)
        told = [each for each in status.problems if each.startswith(waits)]
        return there.status == "quit" and int(there.balance) >= STAKE and len(told) == 1

    await operator.until_status(waiting, "it is out, and waits")
    assert await kick_outs(operator) == counted + 1
    await restart(operator)
    await operator.until_status(waiting, "it waits still")

    # Then it joins again by itself, not before its time, and takes tasks.
    await operator.until_serving()
    await operator.until_status(lambda status: not status.problems, "nothing is wrong any more")
    (kick,) = kicks(operator, ours.address, begun)
    joined = joins(operator, ours.address, kick)
    moment = {block: operator.web3.eth.get_block(block)["timestamp"] for block in (kick, *joined)}
    assert [moment[block] - moment[kick] >= FIRST_REJOIN_SECONDS - 1 for block in joined] == [True]
    for spare in spares:
        code, _, error = await cli(operator, "fleet", "clear", spare)
        assert code == 0, error
    (report,) = await operator.send(task("after-all", seed=94, min_vram=int(LONE.vram))).ended()
    await operator.assert_paid_once(report)


async def kick_outs(operator: OperatorWorld) -> float:
    """As the coordinator counts them, from itself: the API keeps an answer for a moment."""
    text = await answer_of(operator.coordinator().metrics_text.remote())
    return next(
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == "crynux_kick_outs_total"
    )


def kicks(operator: OperatorWorld, account: str, since: int) -> list[int]:
    """The blocks after that one in which the network threw the account out."""
    events = _registry(operator).events.NodeKickedOut.get_logs(from_block=since)
    found = [each["blockNumber"] for each in events if each["args"]["nodeAddress"] == account]
    return [block for block in found if block > since]


def joins(operator: OperatorWorld, account: str, since: int) -> list[int]:
    """The blocks after that one in which the account came to have a stake."""
    staked = _registry(operator).functions.getStakedAmount(Web3.to_checksum_address(account))
    blocks = range(since, operator.web3.eth.block_number + 1)
    stakes = [staked.call(block_identifier=block) for block in blocks]
    pairs = itertools.pairwise(stakes)
    return [block for block, (old, new) in zip(blocks[1:], pairs, strict=True) if new > old]


def _registry(operator: OperatorWorld) -> Any:
    place = Web3.to_checksum_address(operator.devnet.deployment.node)
    return operator.web3.eth.contract(place, abi=contract("Node").abi)


async def plans_pass(operator: OperatorWorld) -> None:
    """A coordinator acts, and the fleet has been planned some times since."""
    await operator.until_status(lambda status: status.acting, "a coordinator acts")
    begun = operator.web3.eth.block_number
    await operator.until_true(
        lambda: operator.web3.eth.block_number > begun + 6 * FLEET_SECONDS / BLOCK_SECONDS,
        "the time of some plans has passed",
    )


def rob(operator: OperatorWorld, key: LocalAccount) -> None:
    """As whoever has the key may do it, past the operator: pause, quit, and take the stake."""
    eth, functions = operator.web3.eth, _registry(operator).functions
    thief = Web3.to_checksum_address("0x" + "e1" * 20)
    for call in (functions.pause(), functions.quit(), None):
        nonce = eth.get_transaction_count(key.address, "pending")
        wish: Any = {"from": key.address, "nonce": nonce}
        plain = wish | {"to": thief, "value": STAKE, "gas": 21_000, "gasPrice": eth.gas_price}
        built: Any = plain if call is None else call.build_transaction(wish)
        signed = key.sign_transaction(built | {"chainId": eth.chain_id})
        receipt = eth.wait_for_transaction_receipt(eth.send_raw_transaction(signed.raw_transaction))
        assert receipt["status"] == 1
