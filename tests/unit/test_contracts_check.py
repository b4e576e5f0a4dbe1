"""What is found out about the configured contracts before anything is sent to them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cluster.chain.contract import Contract
from cluster.chain.network import Contracts
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError, ConfigError
from cluster.core.types import Address

TASK, NODE, QOS = (Address("0x" + digit * 40) for digit in "123")
CHAIN = 5


class FakeChain:
    """Contracts that know their own read and revert on all else."""

    def __init__(self) -> None:
        contracts = Contracts.at(Rpc(self), TASK, NODE, QOS)
        self.known = {
            TASK: self._selector(contracts.task, "getNodeTask"),
            NODE: self._selector(contracts.node, "getStakedAmount"),
            QOS: self._selector(contracts.qos, "getTaskScore"),
        }
        self.away = False

    def _selector(self, contract: Contract, name: str) -> str:
        return "0x" + contract.encode(name, TASK)[:4].hex()

    async def __call__(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        await asyncio.sleep(0)
        if method == "eth_call":
            if self.away:
                raise ChainError("the endpoint doesn't answer")
            call = params[0]
            if self.known.get(call["to"]) == call["data"][:10]:
                return {"result": "0x" + "00" * 32}
            return {"error": {"code": 3, "message": "execution reverted", "data": "0x"}}
        answers = {
            "eth_chainId": hex(CHAIN),
            "eth_getCode": "0x60",
            "eth_getBlockByNumber": {"number": "0x9", "timestamp": "0x1"},
        }
        return {"result": answers[method]}


async def test_each_contract_is_asked_what_only_it_knows() -> None:
    rpc = Rpc(FakeChain())
    await Contracts.at(rpc, TASK, NODE, QOS).check(rpc, CHAIN)
    with pytest.raises(ConfigError, match="serves chain 5, not 6"):
        await Contracts.at(rpc, TASK, NODE, QOS).check(rpc, CHAIN + 1)


@pytest.mark.parametrize(
    ("addresses", "wrong"),
    [
        ((NODE, TASK, QOS), "task"),
        ((TASK, QOS, NODE), "node"),
        ((TASK, NODE, NODE), "qos"),
    ],
)
async def test_addresses_that_were_mixed_up_are_the_operators_input(
    addresses: tuple[Address, Address, Address], wrong: str
) -> None:
    rpc = Rpc(FakeChain())
    with pytest.raises(ConfigError, match=f"isn't the {wrong} contract"):
        await Contracts.at(rpc, *addresses).check(rpc, CHAIN)


async def test_a_chain_that_goes_away_meanwhile_says_nothing_about_the_addresses() -> None:
    chain = FakeChain()
    chain.away = True
    rpc = Rpc(chain)
    with pytest.raises(ChainError, match="doesn't answer"):
        await Contracts.at(rpc, TASK, NODE, QOS).check(rpc, CHAIN)
