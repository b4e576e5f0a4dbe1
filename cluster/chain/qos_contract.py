"""The quality-of-service contract (QOS, protocol.md section 2)."""

from __future__ import annotations

from cluster.chain.abi import QOS_ABI
from cluster.chain.contract import Contract
from cluster.chain.rpc import Rpc
from cluster.core.types import Address


class QosContract(Contract):
    def __init__(self, rpc: Rpc, address: Address) -> None:
        super().__init__(rpc, address, QOS_ABI)

    async def score(self, account: Address, block: int) -> int:
        return int(await self.read("getTaskScore", account, block=block))

    async def should_kick_out(self, account: Address, block: int) -> bool:
        return bool(await self.read("shouldKickOut", account, block=block))
