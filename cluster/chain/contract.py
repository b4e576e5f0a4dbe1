"""What the contract wrappers share: encoding calls, decoding answers and logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eth_abi.codec import ABICodec
from eth_abi.decoding import StringDecoder
from eth_abi.encoding import TextStringEncoder
from eth_abi.exceptions import DecodingError
from eth_abi.registry import BaseEquals, registry
from eth_typing import ABI, ABIEvent, ABIFunction
from eth_utils.abi import (
    event_abi_to_log_topic,
    function_abi_to_4byte_selector,
    get_abi_input_types,
    get_abi_output_types,
    get_all_event_abis,
    get_all_function_abis,
)
from eth_utils.address import to_checksum_address

from cluster.chain.rpc import Call, Log, Rpc
from cluster.core.errors import ChainError
from cluster.core.types import Address, Commitment

NOBODY = "0x" + "00" * 20
NOTHING = b"\x00" * 32


class _TolerantStringDecoder(StringDecoder):
    """Strings come from applications: one of broken UTF-8 must not make its task unreadable."""

    def __init__(self) -> None:
        super().__init__("replace")  # type: ignore[no-untyped-call]


def _codec() -> ABICodec:
    own = registry.copy()  # type: ignore[no-untyped-call]
    own.unregister("string")
    strings = BaseEquals("string")  # type: ignore[no-untyped-call]
    own.register(strings, TextStringEncoder, _TolerantStringDecoder, label="string")
    return ABICodec(own)


CODEC = _codec()


def address_of(value: str) -> Address:
    return Address(to_checksum_address(value))


def commitment_of(value: bytes) -> Commitment:
    return Commitment("0x" + value.hex())


def commitment_bytes(task: Commitment) -> bytes:
    return bytes.fromhex(task.removeprefix("0x"))


class Contract:
    """One deployed contract. Reads are pinned to a block; writes are only encoded here."""

    def __init__(self, rpc: Rpc, address: Address, abi: ABI) -> None:
        self.address = address
        self._rpc = rpc
        self._functions: dict[str, ABIFunction] = {
            each["name"]: each for each in get_all_function_abis(abi)
        }

    def encode(self, name: str, *arguments: Any) -> bytes:
        function = self._functions[name]
        encoded = CODEC.encode(get_abi_input_types(function), arguments)
        return function_abi_to_4byte_selector(function) + encoded

    async def read(self, name: str, *arguments: Any, block: int) -> Any:
        """The function's one result. Raises `Reverted`, or `ChainError` when it can't be one."""
        data = await self._rpc.call(Call(self.address, self.encode(name, *arguments)), block)
        try:
            (result,) = CODEC.decode(get_abi_output_types(self._functions[name]), data)
        except (DecodingError, ValueError, OverflowError) as error:
            raise ChainError(
                f"{name} at {self.address}: an answer that can't be: {error}"
            ) from error
        return result


def events_by_topic(abi: ABI) -> Mapping[bytes, ABIEvent]:
    return {event_abi_to_log_topic(each): each for each in get_all_event_abis(abi)}


def decode_log(log: Log, events: Mapping[bytes, ABIEvent]) -> tuple[str, dict[str, Any]] | None:
    """The event's name and fields; None for a log that is none of `events`, or malformed."""
    event = events.get(log.topics[0]) if log.topics else None
    if event is None:
        return None
    try:
        values = CODEC.decode(get_abi_input_types(event), log.data)
    except (DecodingError, ValueError, OverflowError):
        return None
    return event["name"], {
        str(field.get("name")): value for field, value in zip(event["inputs"], values, strict=True)
    }
