"""What contracts say when they won't: as it comes over the wire, in words and by what it means."""

from __future__ import annotations

import pytest
from eth_abi.abi import encode
from eth_utils.abi import function_signature_to_4byte_selector
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.chain.reverts import Revert, RevertKind, Verdict, decode, verdict

MESSAGE = "execution reverted"
SOMEBODY = "0x" + "ab" * 20


def data_of(signature: str, *values: object) -> bytes:
    types = signature.removesuffix(")").split("(")[1]
    said = encode(types.split(","), values) if types else b""
    return function_signature_to_4byte_selector(signature) + said


def test_a_contracts_own_words() -> None:
    found = decode(data_of("Error(string)", "Wrong task"), "whatever the endpoint says")
    assert found == Revert(RevertKind.TEXT, "Wrong task")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x11, "panic 0x11: arithmetic overflow"),
        (0x32, "panic 0x32: index out of bounds"),
        (0x99, "panic 0x99: unknown code"),
    ],
)
def test_a_panic_by_its_name(code: int, words: str) -> None:
    assert decode(data_of("Panic(uint256)", code), MESSAGE) == Revert(RevertKind.PANIC, words)


@pytest.mark.parametrize(
    ("signature", "values", "words"),
    [
        ("ReentrancyGuardReentrantCall()", (), "ReentrancyGuardReentrantCall()"),
        (
            "OwnableUnauthorizedAccount(address)",
            (SOMEBODY,),
            f"OwnableUnauthorizedAccount({SOMEBODY})",
        ),
        (
            "EnumerableMapNonexistentKey(bytes32)",
            (b"\x01" * 32,),
            f"EnumerableMapNonexistentKey(0x{'01' * 32})",
        ),
        ("InsufficientBalance(uint256,uint256)", (1, 400), "InsufficientBalance(1, 400)"),
    ],
)
def test_an_error_that_a_contract_declares(
    signature: str, values: tuple[object, ...], words: str
) -> None:
    assert decode(data_of(signature, *values), MESSAGE) == Revert(RevertKind.CUSTOM, words)


def test_an_error_that_nobody_knows_is_named_by_its_bytes() -> None:
    found = decode(bytes.fromhex("deadbeef") + bytes(32), MESSAGE)
    assert found == Revert(RevertKind.CUSTOM, "error 0xdeadbeef that isn't known")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("execution reverted: Task not found", "Task not found"),
        ("execution reverted", "no reason given"),
        ("", "no reason given"),
        ("x" * 500, "x" * 200 + " …"),
    ],
)
def test_without_data_the_endpoints_message(message: str, words: str) -> None:
    assert decode(b"", message) == Revert(RevertKind.BARE, words)


@given(st.binary(max_size=300), st.text(max_size=300))
@example(bytes.fromhex("08c379a0"), MESSAGE)
@example(bytes.fromhex("08c379a0") + b"\xff" * 64, MESSAGE)
@example(bytes.fromhex("4e487b71") + b"\x01", MESSAGE)
@example(data_of("Error(string)", "x") + bytes(100_000), MESSAGE)
@example(data_of("Error(string)", "\n" * 1000), MESSAGE)
@example(b"", "execution reverted: a\0b\nc\x1b[31m")
def test_whatever_comes_is_one_short_line(data: bytes, message: str) -> None:
    found = decode(data, message)
    assert 0 < len(found.reason) <= 300
    assert found.reason.isprintable()


@pytest.mark.parametrize(
    ("reason", "means"),
    [
        ("Timeout not reached", Verdict.EARLY),
        ("Illegal previous task state", Verdict.EARLY),
        ("Node already joined", Verdict.DONE),
        ("Wrong task", Verdict.LOST),
        ("Task not found", Verdict.LOST),
        ("panic 0x11: arithmetic overflow", Verdict.UNKNOWN),
        ("reverted in block 17", Verdict.UNKNOWN),
    ],
)
def test_what_a_refusal_means(reason: str, means: Verdict) -> None:
    assert verdict(reason) is means
