"""What a contract says when it won't, decoded and typed: pure.

Three forms go over the wire: `Error(string)`, Solidity's `Panic(uint256)`, and errors that a
contract declares itself, told apart by their first four bytes. The network's contracts speak in
strings (protocol.md section 2) and rest on libraries that have errors of their own.

What a refusal means (`Verdict`) sets only when it is worth trying again; what then follows for a
task, the facts decide.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError
from eth_utils.abi import function_signature_to_4byte_selector

MAX_TEXT: Final = 200
_MAX_DATA: Final = 8192

PANICS: Final[Mapping[int, str]] = {
    0x00: "generic panic",
    0x01: "assertion failed",
    0x11: "arithmetic overflow",
    0x12: "division by zero",
    0x21: "value out of an enum's range",
    0x22: "broken storage encoding",
    0x31: "pop of an empty array",
    0x32: "index out of bounds",
    0x41: "too much memory",
    0x51: "call of an unset function",
}
"""Solidity's panic codes."""

_DECLARED: Final = (
    "AddressInsufficientBalance(address)",
    "AddressEmptyCode(address)",
    "EnforcedPause()",
    "EnumerableMapNonexistentKey(bytes32)",
    "ExpectedPause()",
    "FailedCall()",
    "FailedInnerCall()",
    "InsufficientBalance(uint256,uint256)",
    "InvalidInitialization()",
    "NotInitializing()",
    "OwnableInvalidOwner(address)",
    "OwnableUnauthorizedAccount(address)",
    "ReentrancyGuardReentrantCall()",
    "SafeCastOverflowedUintDowncast(uint8,uint256)",
)
"""Errors of the libraries that such contracts are built from."""


class RevertKind(enum.Enum):
    TEXT = "text"
    PANIC = "panic"
    CUSTOM = "custom"
    """An error that the contract, or a library in it, declares."""
    BARE = "bare"
    """No data came with it."""


@dataclass(frozen=True, slots=True)
class Revert:
    """`reason` is one short line for a person; for a text, the contract's own words."""

    kind: RevertKind
    reason: str


class Verdict(enum.Enum):
    """What a refused transaction's fate most likely is."""

    EARLY = "early"
    """The contract's state isn't there yet, or the endpoint's is behind: soon."""
    DONE = "done"
    """It came to be already, by another transaction or before a crash."""
    LOST = "lost"
    """It can't come to be any more: the task is gone, ended, or another's."""
    UNKNOWN = "unknown"


_VERDICTS: Final[Mapping[str, Verdict]] = {
    "Timeout not reached": Verdict.EARLY,
    # Before it also: the parameters' report may be missing in the block that was simulated on.
    "Illegal previous task state": Verdict.EARLY,
    "Illegal node status": Verdict.EARLY,
    "Node already joined": Verdict.DONE,
    "Wrong task": Verdict.LOST,
    "Task not found": Verdict.LOST,
    "Invalid caller": Verdict.LOST,
    "Invalid task score": Verdict.LOST,
    "Node has quitted": Verdict.LOST,
}


def verdict(reason: str) -> Verdict:
    """By the contracts' words (protocol.md section 2, "Revert reasons that a node meets")."""
    return _VERDICTS.get(reason, Verdict.UNKNOWN)


def decode(data: bytes, message: str) -> Revert:
    """The revert that `data` holds; without data, what the endpoint's `message` says of it."""
    if not data:
        return Revert(RevertKind.BARE, _from_message(message))
    declared = _BY_SELECTOR.get(data[:4])
    try:
        if declared == _ERROR:
            return Revert(RevertKind.TEXT, brief(str(_values("string", data)[0])))
        if declared == _PANIC:
            code = int(_values("uint256", data)[0])
            return Revert(RevertKind.PANIC, f"panic {code:#x}: {PANICS.get(code, 'unknown code')}")
        if declared is not None:
            name, types = declared.removesuffix(")").split("(")
            values = _values(types, data)
            return Revert(RevertKind.CUSTOM, brief(f"{name}({', '.join(map(_plain, values))})"))
    except (DecodingError, ValueError, OverflowError):
        pass
    text = _from_message(message)
    found = f"error 0x{data[:4].hex()} that isn't known"
    return Revert(RevertKind.CUSTOM, found if text == _NOTHING else f"{text} ({found})")


def brief(text: str) -> str:
    """A stranger's words on one line, and not a long one: without what moves a terminal's cursor,
    or what a database doesn't take."""
    beginning = text[: MAX_TEXT + 1]
    shown = "".join(each if each.isprintable() else repr(each)[1:-1] for each in beginning)
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]} …"


_ERROR, _PANIC = "Error(string)", "Panic(uint256)"
_NOTHING = "no reason given"
_BY_SELECTOR: Final[Mapping[bytes, str]] = {
    function_signature_to_4byte_selector(each): each for each in (_ERROR, _PANIC, *_DECLARED)
}


def _values(types: str, data: bytes) -> tuple[Any, ...]:
    if len(data) > _MAX_DATA:
        raise ValueError("more than any error holds")
    return tuple(abi_decode(types.split(","), data[4:])) if types else ()


def _plain(value: Any) -> str:
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(value)


def _from_message(message: str) -> str:
    said = message.removeprefix("execution reverted").removeprefix(":").strip()
    return brief(said) or _NOTHING
