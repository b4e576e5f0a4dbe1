"""What is found out at a start, of however many endpoints, each with troubles of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.chain.endpoints import Endpoints
from cluster.chain.rpc import HttpTransport
from cluster.chain.starting import check_contracts
from cluster.core.errors import ChainError, ConfigError
from tests.unit.test_contracts_check import CHAIN, NODE, QOS, TASK, FakeChain


@dataclass
class Start:
    """`away`, `chain`, `bare` (no contracts on it yet) for each endpoint."""

    count: int = 2
    away: set[int] = field(default_factory=set)
    chains: dict[int, int] = field(default_factory=dict)
    bare: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.real = FakeChain()
        self.asked: list[tuple[int, str]] = []
        self.endpoints = Endpoints([self._transport(index) for index in range(self.count)], CHAIN)
        self.endpoints.contracts = (TASK, NODE, QOS)

    def _transport(self, index: int) -> HttpTransport:
        async def send(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
            self.asked.append((index, method))
            if index in self.away:
                raise ChainError("no answer")
            if method == "eth_chainId" and index in self.chains:
                return {"result": hex(self.chains[index])}
            if method == "eth_getCode" and index in self.bare:
                return {"result": "0x"}
            return await self.real(method, params)

        async def close() -> None:
            pass

        return HttpTransport(f"e{index}", send, close)

    async def check(self) -> None:
        await check_contracts(self.endpoints, (TASK, NODE, QOS), CHAIN)

    def problems(self) -> list[str]:
        return [view.problem for view in self.endpoints.views()]


async def test_all_is_well() -> None:
    start = Start()
    await start.check()
    assert start.problems() == ["", ""]


async def test_a_first_endpoint_of_another_chain_is_passed_over() -> None:
    start = Start(chains={0: 6})
    await start.check()
    assert start.problems() == ["serves chain 6", ""]


async def test_a_first_endpoint_that_has_no_contracts_yet_is_passed_over_until_it_has() -> None:
    start = Start(bare={0})
    await start.check()
    (first, second) = start.problems()
    assert f"has no contract at {TASK}" in first
    assert second == ""
    before = len(start.asked)
    start.bare.clear()
    await start.endpoints.check()
    assert start.problems() == ["", ""]
    assert len(start.asked) > before


async def test_what_is_on_it_is_asked_for_once() -> None:
    start = Start()
    await start.check()
    start.asked.clear()
    await start.endpoints.check()
    assert "eth_getCode" not in {method for _, method in start.asked}


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (Start(chains={0: 6, 1: 7}), "serves chain 6, not 5"),
        (Start(bare={0, 1}), "check the task contract's address"),
        (Start(count=1, chains={0: 6}), "serves chain 6, not 5"),
        (Start(count=1, bare={0}), "check the task contract's address"),
    ],
)
async def test_where_all_agree_it_is_the_operators_input(start: Start, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        await start.check()


@pytest.mark.parametrize(
    "start", [Start(away={0, 1}), Start(away={1}, bare={0}), Start(away={1}, chains={0: 6})]
)
async def test_as_long_as_one_has_not_answered_nothing_is_sure(start: Start) -> None:
    with pytest.raises(ChainError, match="no answer") as caught:
        await start.check()
    assert not isinstance(caught.value, ConfigError)


async def test_contracts_that_were_mixed_up_are_found_behind_a_first_that_is_away() -> None:
    start = Start(away={0})
    with pytest.raises(ConfigError, match="isn't the task contract"):
        await check_contracts(start.endpoints, (NODE, TASK, QOS), CHAIN)
