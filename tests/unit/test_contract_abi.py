"""The devnet's contracts speak the network's ABI: every selector, topic and return type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import decode
from eth_utils.crypto import keccak

from devnet.compile import CONTRACTS, load, sources_digest

VECTORS = json.loads((Path(__file__).parent.parent / "data" / "abi.json").read_text("utf-8"))


def canonical(item: dict[str, Any]) -> str:
    """A parameter's type as selectors spell it, structs written out."""
    kind: str = item["type"]
    if kind.startswith("tuple"):
        return listed(item["components"]) + kind.removeprefix("tuple")
    return kind


def listed(items: list[dict[str, Any]]) -> str:
    return "(" + ",".join(canonical(item) for item in items) + ")"


def described(contract: str, kind: str) -> dict[str, dict[str, Any]]:
    return {
        item["name"] + listed(item["inputs"]): item
        for item in load(contract).abi
        if item["type"] == kind
    }


def cases(section: str) -> list[tuple[str, str, str]]:
    return [
        (contract, signature, value)
        for contract, entries in VECTORS[section].items()
        for signature, value in entries.items()
    ]


@pytest.mark.parametrize(("contract", "signature", "selector"), cases("functions"))
def test_function(contract: str, signature: str, selector: str) -> None:
    assert signature in described(contract, "function")
    assert "0x" + keccak(text=signature)[:4].hex() == selector


@pytest.mark.parametrize(("contract", "signature", "topic"), cases("events"))
def test_event(contract: str, signature: str, topic: str) -> None:
    event = described(contract, "event")[signature]
    assert "0x" + keccak(text=signature).hex() == topic
    assert not any(parameter["indexed"] for parameter in event["inputs"])


@pytest.mark.parametrize(("contract", "signature", "types"), cases("returns"))
def test_return_type(contract: str, signature: str, types: str) -> None:
    assert listed(described(contract, "function")[signature]["outputs"]) == types


def test_no_event_beyond_the_networks() -> None:
    for contract in CONTRACTS:
        assert set(described(contract, "event")) == set(VECTORS["events"].get(contract, {}))


@pytest.mark.parametrize(("contract", "function"), [("VSSTask", "createTask"), ("Node", "join")])
def test_payable(contract: str, function: str) -> None:
    payable = [
        item["name"] for item in load(contract).abi if item.get("stateMutability") == "payable"
    ]
    assert payable == [function]


def test_task_example_decodes() -> None:
    example = VECTORS["getTask_example"]
    outputs = described("VSSTask", "function")["getTask(bytes32)"]["outputs"]
    (value,) = decode(
        [canonical(item) for item in outputs], bytes.fromhex(example["returndata"][2:])
    )
    plain = [item if not isinstance(item, bytes) else "0x" + item.hex() for item in value]
    plain = [list(item) if isinstance(item, tuple) else item for item in plain]
    assert plain == example["decoded"]


@pytest.mark.parametrize("contract", CONTRACTS)
def test_artifact_is_of_these_sources(contract: str) -> None:
    path = Path(__file__).parents[2] / "devnet" / "artifacts" / f"{contract}.json"
    assert json.loads(path.read_text("utf-8"))["sources_sha256"] == sources_digest()
