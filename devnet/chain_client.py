"""The application's way to the chain: its contracts, and transactions that are waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from eth_account.signers.local import LocalAccount
from web3 import AsyncWeb3
from web3.eth import AsyncEth
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from cluster.core.errors import ChainError
from devnet.compile import load
from devnet.tasks import fees

RECEIPT_SECONDS = 60.0


class _HttpProvider(AsyncJSONBaseProvider):
    """Over httpx. web3's own takes a thread lock for each call, which a cancelled call keeps for
    good: whoever comes next waits for ever, the interpreter's exit included."""

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        super().__init__()
        self._url = url
        self._http = http

    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        body = self.encode_rpc_request(method, params)
        headers = {"content-type": "application/json"}
        answer = await self._http.post(self._url, content=body, headers=headers)
        return self.decode_rpc_response(answer.raise_for_status().content)


class ChainClient:
    def __init__(self, rpc_url: str, chain_id: int, http: httpx.AsyncClient) -> None:
        self._web3 = AsyncWeb3(_HttpProvider(rpc_url, http))
        self._chain_id = chain_id
        self._sending = asyncio.Lock()

    @property
    def eth(self) -> AsyncEth:
        return self._web3.eth

    def contract(self, address: str, name: str) -> Any:
        return self.eth.contract(address=AsyncWeb3.to_checksum_address(address), abi=load(name).abi)

    async def send(self, call: Any, account: LocalAccount, *, value: int = 0, gas: int = 0) -> None:
        """Send and wait for success; raises `ContractLogicError` or `ChainError` on a revert. `gas`
        is estimated where none is given."""
        async with self._sending:
            transaction = await call.build_transaction(
                {
                    "from": account.address,
                    "value": value,
                    "nonce": await self.eth.get_transaction_count(account.address, "pending"),
                    "chainId": self._chain_id,
                    **({"gas": gas} if gas else {}),
                    **fees(await self.eth.get_block("latest")),
                }
            )
            if not gas:
                # What the call costs depends on what else comes into its block before it.
                transaction["gas"] = 2 * transaction["gas"] + 100_000
            signed = account.sign_transaction(transaction)
            sent = await self.eth.send_raw_transaction(signed.raw_transaction)
        receipt = await self.eth.wait_for_transaction_receipt(sent, RECEIPT_SECONDS)
        if receipt["status"] != 1:
            raise ChainError(f"{call.fn_name} was reverted")
