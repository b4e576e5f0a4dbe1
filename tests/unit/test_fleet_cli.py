"""`crynux-cluster fleet`, `drain` and `resume`: what is asked of the coordinator, what is shown."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from actors import client
from cluster.cli import main
from cluster.core.errors import ClusterError, ConfigError
from cluster.status import ClassStatus, DrainStatus, FleetStatus
from tests.unit.test_client import FakeRay, config
from tests.unit.test_config import MINIMAL

module: Any = import_module("cluster.cli.fleet")
"""Whose name in its package is the command's."""


def pops(*found: Any) -> Callable[[], Any]:
    left = list(found)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_applying_shows_each_step_once_until_nothing_is_on_its_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    looks = pops(
        FleetStatus(plan=("fund a", "join b")),
        FleetStatus(plan=("join b",)),
        FleetStatus(moving=2),
        FleetStatus(plan=("join a",)),
        FleetStatus(),
    )
    module._follow(looks, lambda _: None)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["fund a", "join b", "join a", module._NOTHING]


def test_applying_ends_when_the_operator_has_to_do_something() -> None:
    with pytest.raises(ClusterError, match="the treasury has 5 wei"):
        module._follow(lambda: FleetStatus(lacks=("the treasury has 5 wei",)), lambda _: None)


def test_a_plan_in_words() -> None:
    found = FleetStatus(
        plan=("join a",),
        lacks=("money",),
        limits=("budget",),
        classes=(
            ClassStatus(name="Card", vram=8, slots=2, least=4),
            ClassStatus(name="Old", vram=4, slots=1, least=0, stopped=True),
        ),
    )
    assert module._lines(found) == [
        "Card (8 GB): 4 accounts wanted, 2 for each card",
        "Old (4 GB): 0 accounts wanted, 1 for each card, stopped",
        "  to do: join a",
        "  lacking: money",
        "  limit: budget",
    ]
    assert module._lines(FleetStatus()) == [module._NOTHING]


def test_waiting_for_a_drain(capsys: pytest.CaptureFixture[str]) -> None:
    busy = DrainStatus(everything=True, left=("2 tasks are open",))
    looks = pops(busy, busy, DrainStatus(everything=True, done=True))
    assert module._wait_drained(looks, None, lambda _: None) == 0
    assert capsys.readouterr().out.splitlines() == ["2 tasks are open", "drained"]
    clock = pops(0.0, 1.0, 6.0)
    assert module._wait_drained(lambda: busy, 5.0, lambda _: None, clock) == 1
    assert "not drained yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("drain", "--gpu", "a", "--node", "b"), "name one of them"),
        (("drain", "--now"), "--now is for --gpu or --node"),
    ],
)
def test_what_cant_be_meant_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--config", str(file)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# --- what the coordinator answers -----------------------------------------------------------------


@pytest.mark.parametrize(("done", "said"), [("cleared", "is cleared"), ("free", "nothing stops")])
def test_an_account_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: str, said: str
) -> None:
    FakeRay(monkeypatch, clear_account=done)
    assert said in client.clear_account(config(tmp_path), "0x1")


def test_what_nobody_knows_is_the_operators_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay(monkeypatch, clear_account="unknown", drain="unknown", end_drain="free")
    with pytest.raises(ConfigError, match="none of the node accounts"):
        client.clear_account(config(tmp_path), "0x1")
    with pytest.raises(ConfigError, match="no card is known as x"):
        client.drain(config(tmp_path), "card", "x")
    assert client.end_drain(config(tmp_path)) == "nothing was drained"


def test_a_coordinator_that_doesnt_act_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch, drain="not acting")
    with pytest.raises(ClusterError, match="not acting"):
        client.drain(config(tmp_path), "everything")
    assert fake.left == 1
