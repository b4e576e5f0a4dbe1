"""What an endpoint says is checked before anyone sees it: kinds, bounds, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cluster.chain.clock import ChainClock
from cluster.chain.rpc import LAST_TIMESTAMP, Block, Rpc
from cluster.chain.task_contract import task_facts
from cluster.core.errors import ChainError
from cluster.core.types import Address, Timestamp
from tests.unit.test_watcher import OURS, TASK, TASKS, log

HASH = "0x" + "ab" * 32
HUGE = hex(2**63)


def rpc(answer: Any) -> Rpc:
    async def send(_method: str, _params: Sequence[Any]) -> Mapping[str, Any]:  # noqa: RUF029
        return {"result": answer}

    return Rpc(send)


BLOCK = {"number": "0x1", "timestamp": "0x1", "hash": HASH}
RECEIPT = {"blockNumber": "0x1", "status": "0x1", "gasUsed": "0x5", "effectiveGasPrice": "0x2"}


@pytest.mark.parametrize("key", ["number", "timestamp"])
@pytest.mark.parametrize("value", [HUGE, "0x" + "f" * 64, "5", None, 5, "0x", "-0x1", "0x1g"])
async def test_a_block_of_nonsense_is_none(key: str, value: object) -> None:
    with pytest.raises(ChainError):
        await rpc(BLOCK | {key: value}).head()


@pytest.mark.parametrize(
    "change",
    [
        {"blockNumber": HUGE},
        {"gasUsed": HUGE},
        {"status": None},
        {"transactionHash": "0x" + "cd" * 32},
    ],
)
async def test_a_receipt_of_nonsense_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(ChainError):
        await rpc(RECEIPT | change).receipt(HASH)


async def test_a_receipt_as_it_should_be() -> None:
    found = await rpc(RECEIPT | {"transactionHash": HASH.upper().replace("X", "x")}).receipt(HASH)
    assert found is not None and (found.block, found.succeeded, found.cost) == (1, True, 10)
    assert await rpc(RECEIPT | {"blockNumber": None}).receipt(HASH) is None


@pytest.mark.parametrize("value", [HUGE, None, "1"])
async def test_counts_and_gas_of_nonsense_are_none(value: object) -> None:
    with pytest.raises(ChainError):
        await rpc(value).transaction_count(OURS)


async def test_logs_of_other_blocks_than_were_asked_for_are_left_out() -> None:
    logs = [log("TaskStarted", TASK, OURS, block=block) for block in (4, 5, 6, 7, 2**62)]
    found = await rpc([*logs, logs[1] | {"blockNumber": HUGE}]).logs([TASKS], 5, 6)
    assert [each.block for each in found] == [5, 6]


def test_a_task_may_have_a_timeout_that_no_clock_reaches() -> None:
    nobody = "0x" + "00" * 20
    first = (0, nobody, TASK, b"", b"", 0, 1, OURS)
    second: tuple[Any, ...] = (2**256 - 1, b"", 2**256 - 1, 0, [], 8, "", 0)
    third: tuple[Any, ...] = ((2, 5, 0), 0, 0, [], [], 0, 2**256 - 1, 0)
    facts = task_facts((*first, *second, *third), {Address(OURS)})
    assert facts.deadline == facts.started_at == Timestamp(LAST_TIMESTAMP)
    assert facts.deadline is not None
    assert facts.deadline - ChainClock().observe(Block(1, Timestamp(1)), Timestamp(5.5)) > 0
