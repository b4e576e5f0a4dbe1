"""The doctor against a whole devnet: what is right, and each thing that can be wrong."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import config
from cluster.doctor import check_relay
from devnet.network import Devnet

OTHER = "0x5FbDB2315678afecb367f032d93F642f64180aa3"


@pytest.fixture(scope="module")
def devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devnet]:
    with Devnet(
        tmp_path_factory.mktemp("devnet"), block_time=1.0, models=Path(".devnet/models")
    ) as made:
        yield made


def examined(devnet: Devnet, **changes: dict[str, Any]) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and checks by name, with so much of the configuration changed."""
    changed = yaml.safe_load(devnet.config_file.read_text())
    for section, values in changes.items():
        changed[section] = {**changed.get(section, {}), **values}
    file = devnet.directory / "examined.yaml"
    file.write_text(yaml.safe_dump(changed))
    command = [sys.executable, "-m", "cluster.cli", "doctor", "--json", "--config", str(file)]
    done = subprocess.run(  # noqa: S603 - our own command
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "CRYNUX_PASSWORD": "", "RAY_ADDRESS": "127.0.0.1:9"},
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, {
        each["name"].split(" at ")[0]: each for each in json.loads(done.stdout)
    }


def test_a_devnet_is_well(devnet: Devnet) -> None:
    code, found = examined(devnet)
    assert code == 0, found
    assert {each["level"] for each in found.values()} <= {"ok", "warn"}
    assert found["chain"]["level"] == "ok"
    assert found["relay"]["level"] == "ok"
    assert found["balances"]["level"] == "ok"
    assert found["stake"]["level"] == "ok"
    assert found["key"]["level"] == "warn"  # in plain text
    assert not (devnet.directory / "operator").exists(), "it only looks"


def test_a_stake_that_the_contract_wouldnt_take_fails(devnet: Devnet) -> None:
    code, found = examined(devnet, network={"stake": "399.9"})
    assert code == 1
    assert found["stake"]["level"] == "fail"
    assert "Staked amount is not enough" in found["stake"]["found"]


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"network": {"chain_id": 5}}, "chain", "serves chain 31337, not 5"),
        ({"network": {"rpc_url": "http://127.0.0.1:9"}}, "chain", "doesn't answer"),
        ({"network": {"relay_url": "http://127.0.0.1:9"}}, "relay", "ConnectError"),
        ({"identity": {"seed_file": "none"}}, "key", "there is no such file"),
        ({"ray": {"address": "127.0.0.1:9"}}, "Ray", "nothing answers"),
        ({"ray": {"address": "auto"}}, "Ray", "auto: nothing answers at 127.0.0.1:9"),
    ],
)
def test_what_is_wrong_fails_with_its_mending(
    devnet: Devnet, changes: dict[str, dict[str, Any]], name: str, said: str
) -> None:
    code, found = examined(devnet, **changes)
    assert code == 1
    assert found[name]["level"] == "fail"
    assert said in found[name]["found"]
    assert found[name]["mend"]


@pytest.mark.parametrize(("off", "level"), [(-70, "fail"), (-50, "ok"), (50, "ok"), (70, "fail")])
def test_a_clock_that_the_relay_would_refuse_fails(devnet: Devnet, off: int, level: str) -> None:
    settings = config.load(devnet.config_file)
    found = asyncio.run(check_relay(settings, lambda: time.time() + off))
    assert found.level.value == level
    assert bool(found.mend) == (level == "fail")


def test_a_wrong_contract_is_named(devnet: Devnet) -> None:
    contracts = {
        "task": devnet.deployment.task,
        "node": devnet.deployment.qos,
        "qos": devnet.deployment.qos,
    }
    code, found = examined(devnet, network={"contracts": contracts})
    assert code == 1
    assert "isn't the node contract" in found["chain"]["found"]


def test_too_little_money_is_a_warning(devnet: Devnet) -> None:
    code, found = examined(devnet, identity={"accounts": 60})
    assert code == 0
    assert found["balances"]["level"] == "ok", "there are cards for four of them"
    many = {"identity": {"accounts": 60}, "fleet": {"slots_per_gpu": 16}}
    code, found = examined(devnet, **many)
    assert code == 0
    assert found["balances"]["level"] == "warn"
    assert "CNX" in found["balances"]["mend"]
    many["fleet"]["stake_budget"] = 4000
    assert examined(devnet, **many)[1]["balances"]["level"] == "ok"
