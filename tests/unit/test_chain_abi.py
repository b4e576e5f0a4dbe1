from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import decode, encode
from eth_typing import ABI
from eth_utils.abi import (
    abi_to_signature,
    event_abi_to_log_topic,
    function_abi_to_4byte_selector,
    get_abi_output_types,
    get_all_event_abis,
    get_all_function_abis,
)

from cluster.chain.abi import NODE_ABI, QOS_ABI, TASK_ABI

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "abi.json").read_text(encoding="utf-8")
)
ABIS: dict[str, ABI] = {"VSSTask": TASK_ABI, "Node": NODE_ABI, "QOS": QOS_ABI}


@pytest.mark.parametrize("contract", ABIS)
def test_selectors(contract: str) -> None:
    ours = {
        abi_to_signature(each): "0x" + function_abi_to_4byte_selector(each).hex()
        for each in get_all_function_abis(ABIS[contract])
    }
    assert ours == VECTORS["functions"][contract]


@pytest.mark.parametrize("contract", ABIS)
def test_topics(contract: str) -> None:
    events = get_all_event_abis(ABIS[contract])
    ours = {abi_to_signature(each): "0x" + event_abi_to_log_topic(each).hex() for each in events}
    assert ours == VECTORS["events"].get(contract, {})
    assert not any(field["indexed"] for each in events for field in each["inputs"])


@pytest.mark.parametrize("contract", ABIS)
def test_return_types(contract: str) -> None:
    ours = {
        abi_to_signature(each): f"({','.join(get_abi_output_types(each))})"
        for each in get_all_function_abis(ABIS[contract])
        if each["stateMutability"] == "view"
    }
    assert ours == VECTORS["returns"][contract]


def test_only_join_and_create_task_take_value() -> None:
    payable = {
        each["name"]
        for abi in ABIS.values()
        for each in get_all_function_abis(abi)
        if each["stateMutability"] == "payable"
    }
    assert payable == {"join", "createTask"}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return "0x" + value.hex()
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def test_the_encoded_task_decodes_and_encodes_back() -> None:
    example = VECTORS["getTask_example"]
    (get_task,) = (each for each in get_all_function_abis(TASK_ABI) if each["name"] == "getTask")
    types = get_abi_output_types(get_task)
    data = bytes.fromhex(example["returndata"][2:])
    (task,) = decode(types, data)
    assert _plain(task) == example["decoded"]
    assert encode(types, [task]) == data
