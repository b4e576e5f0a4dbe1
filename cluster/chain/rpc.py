"""One EVM endpoint: raw JSON-RPC with timeouts, and answers checked before anyone sees them.

Plain JSON-RPC over httpx. Not web3's asynchronous HTTP provider: its session cache takes a thread
lock for each call, which was seen to deadlock for good when many calls ran at once; and callers
here want the endpoint's own errors and decide themselves when to try again.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from eth_utils.address import to_checksum_address

from cluster.chain import answers, reverts
from cluster.chain.answers import MOST_PATIENCE, Throttled, TooLong
from cluster.chain.fees import Market
from cluster.chain.reverts import Revert
from cluster.core.errors import ChainError, ConfigError
from cluster.core.types import Address, Timestamp, Wei

Transport = Callable[[str, Sequence[Any]], Awaitable[Mapping[str, Any]]]
"""Sends one call, gives the JSON-RPC response object; raises `ChainError` when none came."""
AskEach = Callable[[str, Sequence[Any]], Awaitable[Sequence[Mapping[str, Any]]]]
"""Sends one call to several, gives the answers of those that have one; `ChainError` without any."""

BLOCK, COUNT = "eth_getBlockByNumber", "eth_getTransactionCount"
RECEIPT = "eth_getTransactionReceipt"
LATEST = "latest"
PENDING = "pending"
MAX_ANSWER = 32 * 2**20
AT_ONCE = 500
"""Logs that are read before others have their turn."""
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
LAST_TIMESTAMP = 2**40
_MOST_SMALL = 2**62


class RpcRefused(ChainError):
    """The endpoint answered with a JSON-RPC error that isn't a revert."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: {message} ({code})")
        self.code = code
        self.message = message


class Reverted(ChainError):
    """The contract would not do it; `revert` is what it said."""

    def __init__(self, revert: Revert) -> None:
        super().__init__(f"execution reverted: {revert.reason}")
        self.revert = revert

    @property
    def reason(self) -> str:
        return self.revert.reason


@dataclass(frozen=True, slots=True)
class Block:
    """`base_fee` in wei per gas; None on a chain that has none (EIP-1559). `hash` and `parent` are
    empty where the endpoint doesn't say them."""

    number: int
    timestamp: Timestamp
    base_fee: Wei | None = None
    hash: str = ""
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """`block_hash` is empty and `index` None where the endpoint doesn't say them; with them no two
    logs are equal."""

    address: Address
    topics: tuple[bytes, ...]
    data: bytes
    block: int
    block_hash: str = ""
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """`cost`: what its gas came to; 0 where the endpoint doesn't say."""

    block: int
    succeeded: bool
    cost: Wei = Wei(0)


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of a contract; `sender` matters where the contract looks at the caller."""

    to: Address
    data: bytes
    sender: Address | None = None
    value: Wei = Wei(0)

    def fields(self) -> dict[str, str]:
        fields = {"to": self.to, "data": "0x" + self.data.hex()}
        if self.sender is not None:
            fields["from"] = self.sender
        if self.value:
            fields["value"] = hex(self.value)
        return fields


@dataclass(frozen=True, slots=True)
class HttpTransport:
    """`name` is the endpoint's host, which may be shown; the URL may hold a key. The lowest
    `priority` is asked first; `rate` in calls a second."""

    name: str
    send: Transport
    close: Callable[[], Awaitable[None]]
    priority: int = 0
    rate: float | None = None


def http_transport(url: str, timeout: float) -> HttpTransport:
    """A transport over kept-alive connections.

    Redirects are not followed, and an answer of more than `MAX_ANSWER` bytes is not read.
    """
    client = httpx.AsyncClient(timeout=timeout, follow_redirects=False)
    numbers = itertools.count(1)

    async def send(method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        number = next(numbers)
        question = {"jsonrpc": "2.0", "id": number, "method": method, "params": list(params)}
        try:
            async with asyncio.timeout(timeout):
                response, body = await _post(client, url, question)
        except (httpx.HTTPError, TimeoutError, OSError) as error:
            # Its text may hold the address, and the address a key.
            what = type(error).__name__
            raise ChainError(f"{method}: the endpoint doesn't answer: {what}") from None
        if response.status_code == 429:
            raise Throttled(f"{method}: HTTP 429", _retry_after(response))
        return answers.read(method, number, response.status_code, body)

    return HttpTransport(httpx.URL(url).netloc.decode("ascii"), send, client.aclose)


def _retry_after(response: httpx.Response) -> float | None:
    said = response.headers.get("Retry-After", "")
    within = re.fullmatch(r"\d{1,5}", said, re.ASCII)
    return min(float(said), MOST_PATIENCE) if within else None


async def _post(
    client: httpx.AsyncClient, url: str, question: Mapping[str, Any]
) -> tuple[httpx.Response, bytes]:
    body = bytearray()
    async with client.stream("POST", url, json=question) as response:
        async for part in response.aiter_bytes():
            body += part
            if len(body) > MAX_ANSWER:
                raise TooLong(f"{question['method']}: an answer of more than {MAX_ANSWER} bytes")
    return response, bytes(body)


def _result(method: str, answer: Mapping[str, Any]) -> Any:
    if answer.get("error") is not None:
        raise _failure(method, answer["error"])
    if "result" not in answer:
        raise ChainError(f"{method}: an answer without a result")
    return answer["result"]


def _failure(method: str, error: object) -> ChainError:
    if not isinstance(error, Mapping):
        return ChainError(f"{method}: malformed error {brief(error)}")
    code, message, data = error.get("code"), brief(error.get("message", "")), error.get("data")
    payload = _bytes(method, data) if isinstance(data, str) and data.startswith("0x") else b""
    if answers.is_revert(error):
        return Reverted(reverts.decode(payload, message))
    return RpcRefused(method, code if isinstance(code, int) else 0, message)


def brief(value: object) -> str:
    """An endpoint's words, short enough for a log."""
    return reverts.brief(value if isinstance(value, str) else repr(value))


def _int(method: str, value: object) -> int:
    if not isinstance(value, str) or _QUANTITY.fullmatch(value) is None:
        raise ChainError(f"{method}: {brief(value)} is not a quantity")
    return int(value, 16)


def _small(method: str, value: object) -> int:
    """A number of blocks, transactions or units of gas: one that a journal can hold."""
    number = _int(method, value)
    if number > _MOST_SMALL:
        raise ChainError(f"{method}: {number:#x} can't be")
    return number


def _bytes(method: str, value: object) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x"):
        raise ChainError(f"{method}: {brief(value)} is not data")
    try:
        return bytes.fromhex(value[2:])
    except ValueError:
        raise ChainError(f"{method}: {brief(value)} is not data") from None


def _hash(value: object) -> str:
    whole = isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]{64}", value)
    return str(value).lower() if whole else ""


@functools.lru_cache(1024)
def _checksummed(address: str) -> Address:
    """Most logs are of few contracts, and it takes a hash."""
    return Address(to_checksum_address(address))


def _log(value: object) -> Log | None:
    """The log, or None when it can't be one: a bad log must not hide those beside it."""
    if not isinstance(value, Mapping) or value.get("removed"):
        return None
    try:
        address = value.get("address")
        if not isinstance(address, str) or _ADDRESS.fullmatch(address) is None:
            return None
        topics = tuple(_bytes("log", topic) for topic in value.get("topics") or ())
        data, block = _bytes("log", value.get("data")), _small("log", value.get("blockNumber"))
        index = None if value.get("logIndex") is None else _small("log", value.get("logIndex"))
        where = _checksummed(address)
        return Log(where, topics, data, block, _hash(value.get("blockHash")), index)
    except (ChainError, TypeError):
        return None


def _receipt(tx_hash: str, found: object) -> Receipt | None:
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ChainError(f"{RECEIPT}: {brief(found)} is not a receipt")
    if (_hash(found.get("transactionHash")) or tx_hash) != tx_hash:
        raise ChainError(f"{RECEIPT}: the receipt is another transaction's")
    if found.get("blockNumber") is None:
        return None
    status = _int(RECEIPT, found.get("status"))
    cost = 0
    if found.get("gasUsed") is not None and found.get("effectiveGasPrice") is not None:
        price = _int(RECEIPT, found.get("effectiveGasPrice"))
        cost = _small(RECEIPT, found.get("gasUsed")) * price
    return Receipt(_small(RECEIPT, found.get("blockNumber")), status == 1, Wei(cost))


def _count(found: object) -> int:
    return _small(COUNT, found)


def _tag(block: int | str) -> str:
    return hex(block) if isinstance(block, int) else block


class Rpc:
    """Typed calls to an endpoint, or several as one. All raise `ChainError`; `call` also
    `Reverted`."""

    def __init__(
        self,
        transport: Transport,
        close: Callable[[], Awaitable[None]] | None = None,
        ask_each: AskEach | None = None,
    ) -> None:
        """`ask_each` where there are several."""
        self._transport = transport
        self._close = close
        self._ask_each = ask_each

    @classmethod
    def http(cls, url: str, timeout: float = 10.0) -> Rpc:
        made = http_transport(url, timeout)
        return cls(made.send, made.close)

    async def close(self) -> None:
        if self._close is not None:
            await self._close()

    async def request(self, method: str, *params: Any) -> Any:
        return _result(method, await self._transport(method, params))

    async def _of_each(self, method: str, *params: Any) -> tuple[Any, ...]:
        """What every endpoint that answers has to say."""
        if self._ask_each is None:
            return (await self.request(method, *params),)
        return tuple(_result(method, each) for each in await self._ask_each(method, params))

    async def check(self, chain_id: int, contracts: Mapping[str, Address]) -> None:
        """Raises `ConfigError` when this is another chain, or a contract isn't on it."""
        found = await self.chain_id()
        if found != chain_id:
            raise ConfigError(
                f"the endpoint serves chain {found}, not {chain_id}: check the RPC URL and chain id"
            )
        codes = await asyncio.gather(*(self.code(address) for address in contracts.values()))
        for (name, address), code in zip(contracts.items(), codes, strict=True):
            if not code:
                raise ConfigError(
                    f"there is no contract at {address} on chain {chain_id}:"
                    f" check the {name} contract's address"
                )

    async def chain_id(self) -> int:
        return _int("eth_chainId", await self.request("eth_chainId"))

    async def code(self, address: Address) -> bytes:
        return _bytes("eth_getCode", await self.request("eth_getCode", address, LATEST))

    async def head(self) -> Block:
        found = await self.request(BLOCK, LATEST, False)
        if not isinstance(found, Mapping):
            raise ChainError(f"{BLOCK}: {brief(found)} is not a block")
        method = BLOCK
        base_fee, timestamp = found.get("baseFeePerGas"), _int(method, found.get("timestamp"))
        if timestamp > LAST_TIMESTAMP:
            raise ChainError(f"{method}: {timestamp} is not a time")
        return Block(
            _small(method, found.get("number")),
            Timestamp(timestamp),
            None if base_fee is None else Wei(_int(method, base_fee)),
            _hash(found.get("hash")),
            _hash(found.get("parentHash")),
        )

    async def block_hash(self, number: int) -> str | None:
        """Of the block with that number on the chain as it is now; None where there is none."""
        found = await self.request(BLOCK, hex(number), False)
        return _hash(found.get("hash")) or None if isinstance(found, Mapping) else None

    async def call(self, call: Call, block: int | str) -> bytes:
        return _bytes("eth_call", await self.request("eth_call", call.fields(), _tag(block)))

    async def estimate_gas(self, call: Call, block: int | str) -> int:
        return _small(
            "eth_estimateGas", await self.request("eth_estimateGas", call.fields(), _tag(block))
        )

    async def market(self) -> Market:
        """What the chain asks for gas. Not eth_gasPrice where there is a base fee: it follows what
        was offered, and so would grow with every transaction of ours."""
        head = await self.head()
        if head.base_fee is not None:
            return Market(head.base_fee, block=head.number)
        price = Wei(_int("eth_gasPrice", await self.request("eth_gasPrice")))
        return Market(None, price, head.number)

    async def balance(self, address: Address, block: int | str) -> Wei:
        return Wei(
            _int("eth_getBalance", await self.request("eth_getBalance", address, _tag(block)))
        )

    async def transaction_count(self, address: Address, block: int | str = LATEST) -> int:
        """How many transactions of the account are in the chain: the next nonce, pool aside."""
        return _count(await self.request(COUNT, address, _tag(block)))

    async def transaction_counts(self, address: Address) -> tuple[int, ...]:
        """The same, of every endpoint that may be asked."""
        return tuple(map(_count, await self._of_each(COUNT, address, LATEST)))

    async def send(self, raw: bytes) -> None:
        await self.request("eth_sendRawTransaction", "0x" + raw.hex())

    async def receipt(self, tx_hash: str) -> Receipt | None:
        return _receipt(tx_hash, await self.request(RECEIPT, tx_hash))

    async def receipt_anywhere(self, tx_hash: str) -> Receipt | None:
        """As `receipt`, from whichever endpoint has it: not all have those of old."""
        answers = await self._of_each(RECEIPT, tx_hash)
        found = (_receipt(tx_hash, each) for each in answers)
        return next((each for each in found if each is not None), None)

    async def transactions_in(self, block: int) -> tuple[str, ...] | None:
        """The hashes of a block's transactions; None where the endpoint hasn't the block."""
        found = await self.request(BLOCK, hex(block), False)
        there = found.get("transactions") if isinstance(found, Mapping) else None
        if not isinstance(there, list):
            return None
        return tuple(filter(None, map(_hash, there)))

    async def transaction_by(self, sender: Address, nonce: int, block: int) -> str | None:
        """The hash of the sender's transaction with that nonce, where it is in that block."""
        found = await self.request(BLOCK, hex(block), True)
        there = found.get("transactions") if isinstance(found, Mapping) else None
        for each in there if isinstance(there, list) else ():
            named = isinstance(each, Mapping) and str(each.get("from")).lower() == sender.lower()
            if named and each.get("nonce") == hex(nonce):
                return _hash(each.get("hash")) or None
        return None

    async def knows(self, tx_hash: str) -> bool:
        """Whether the endpoint has the transaction, in its pool or in a block."""
        return await self.request("eth_getTransactionByHash", tx_hash) is not None

    async def logs(self, addresses: Sequence[Address], first: int, last: int) -> tuple[Log, ...]:
        """Logs of the blocks `first` to `last`, both included; what is of others is left out."""
        wanted = {"address": list(addresses), "fromBlock": hex(first), "toBlock": hex(last)}
        found = await self.request("eth_getLogs", wanted)
        if not isinstance(found, list):
            raise ChainError(f"eth_getLogs: {brief(found)} is not a list")
        logs: list[Log] = []
        for begin in range(0, len(found), AT_ONCE):
            read = (_log(each) for each in found[begin : begin + AT_ONCE])
            logs += (log for log in read if log is not None and first <= log.block <= last)
            await asyncio.sleep(0)
        return tuple(logs)
