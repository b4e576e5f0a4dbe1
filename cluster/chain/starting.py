"""What is found out before anything is sent to the chain, with any number of endpoints."""

from __future__ import annotations

from cluster.chain.endpoints import Endpoints
from cluster.chain.network import Contracts
from cluster.chain.rpc import Rpc
from cluster.core.types import Address


async def check_contracts(
    endpoints: Endpoints, addresses: tuple[Address, Address, Address], chain_id: int
) -> None:
    """Raises `ConfigError` when every endpoint serves another chain or has no such contracts, or
    one that may be asked has others; `ChainError` when that can't be found out now. What only some
    of them lack is those endpoints' trouble: they aren't asked."""
    rpc = Rpc(endpoints.send)
    contracts = Contracts.at(rpc, *addresses)
    await endpoints.check()
    of_another = endpoints.unsuitable()
    if of_another is not None:
        # It says what is wrong, and whose input that is.
        await contracts.check(Rpc(of_another), chain_id)
    await contracts.check(rpc, chain_id)
