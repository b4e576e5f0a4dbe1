"""`crynux-cluster fleet`, `drain` and `resume`: what is asked of the coordinator, what is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from actors import client
from cluster.cli import main
from cluster.core.errors import ClusterError, ConfigError
from cluster.status import ClassStatus, DrainPart, DrainStatus, FleetStatus
from cluster.steering import DropModel, Order, PreloadModel
from tests.unit.test_client import ADDRESS
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


def test_applying_waits_for_a_coordinator_that_begins_anew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = iter([FleetStatus(plan=("join a",)), None, None, *[FleetStatus()] * 3])

    def look() -> FleetStatus:
        found = next(told)
        if found is None:
            raise ClusterError("the coordinator is not acting now; try again")
        return found

    module._follow(look, lambda _: None)
    away = "the coordinator is not acting now; try again; waiting for it"
    assert capsys.readouterr().out.splitlines() == ["join a", away, module._NOTHING]


def test_applying_ends_with_what_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = ClassStatus(name="Old", vram=4, slots=1, least=0, stopped=True)
    limited = FleetStatus(limits=("the stake budget is spent",), held=("0xa",), classes=(stopped,))
    module._follow(pops(*[FleetStatus(unread=1)] * 3, *[limited] * 3), lambda _: None)
    assert capsys.readouterr().out.splitlines() == [
        "Old (4 GB): 0 accounts wanted, 1 for each card, stopped",
        "  limit: the stake budget is spent",
        "  held: 0xa",
        module._NOTHING_MORE,
    ]


@pytest.mark.parametrize(
    "found",
    [
        FleetStatus(lacks=("money",)),
        FleetStatus(limits=("budget",)),
        FleetStatus(held=("0xa",)),
        FleetStatus(unread=1),
        FleetStatus(classes=(ClassStatus(name="Old", vram=4, slots=1, least=0, stopped=True),)),
    ],
)
def test_nothing_is_said_to_be_well_that_is_not(found: FleetStatus) -> None:
    assert module._lines(found)[-1] == module._NOTHING_MORE
    assert module._NOTHING not in module._lines(found)


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

    def away() -> DrainStatus:
        raise ClusterError("the coordinator doesn't answer")

    asks: list[Callable[[], DrainStatus]] = [lambda: DrainStatus(everything=True, done=True), away]
    assert module._wait_drained(lambda: asks.pop()(), None, lambda _: None) == 0
    assert "doesn't answer; waiting for it\ndrained" in capsys.readouterr().out
    clock = pops(0.0, 1.0, 6.0)
    assert module._wait_drained(lambda: busy, 5.0, lambda _: None, clock) == 1
    assert "not drained yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "name", "found"),
    [
        ("everything", "", DrainStatus()),
        ("everything", "", DrainStatus(cards=("a",), done=True)),
        ("card", "a", DrainStatus(cards=("b",), done=True)),
        ("node", "a", DrainStatus(cards=("a",), left=("1 tasks are computed there",))),
    ],
)
def test_who_waits_for_a_drain_that_somebody_ended_is_told(
    what: str, name: str, found: DrainStatus
) -> None:
    before = DrainStatus(
        everything=what == "everything", cards=("a",), nodes=("a",), left=("1 tasks are open",)
    )
    with pytest.raises(ClusterError, match="somebody ended the drain"):
        module._wait_drained(pops(before, found), None, lambda _: None, what=what, name=name)


@pytest.mark.parametrize(("what", "name"), [("card", "a"), ("node", "b")])
def test_a_part_is_drained_too_when_everything_is(what: str, name: str) -> None:
    here = DrainStatus(cards=("a",), nodes=("b",), left=("1 tasks are computed there",))
    looks = pops(here, DrainStatus(everything=True, done=True))
    assert module._wait_drained(looks, None, lambda _: None, what=what, name=name) == 0


@pytest.mark.parametrize(("what", "name"), [("card", "a"), ("node", "b")])
def test_only_what_was_asked_for_is_waited_for(
    capsys: pytest.CaptureFixture[str], what: Literal["card", "node"], name: str
) -> None:
    def looks(*left: tuple[str, ...]) -> Callable[[], DrainStatus]:
        other = DrainPart(what=what, name="other", left=("3 tasks are computed there",))
        return pops(
            *(
                DrainStatus(
                    cards=("a", "other"),
                    nodes=("b", "other"),
                    left=other.left,
                    parts=(other, DrainPart(what=what, name=name, left=each)),
                )
                for each in left
            )
        )

    asked = looks(("1 tasks are computed there",), ())
    assert module._wait_drained(asked, None, lambda _: None, what=what, name=name) == 0
    assert capsys.readouterr().out.splitlines() == ["1 tasks are computed there", "drained"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("drain", "--gpu", "a", "--node", "b"), "name one of them"),
        (("drain", "--now"), "--now is for --gpu or --node"),
        (("drain", "--gpu", ""), "--gpu is empty: name a card"),
        (("drain", "--now", "--node", ""), "--node is empty: name a node"),
        (("drain", "--gpu", " "), "--gpu is empty"),
        (("drain", "--gpu", "", "--node", "b"), "name one of them"),
        (("resume", "--gpu", ""), "--gpu is empty: name a card"),
        (("resume", "--node", ""), "--node is empty: name a node"),
    ],
)
def test_what_cant_be_meant_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    for name in ("perform", "asking"):
        monkeypatch.setattr(client, name, lambda *_: pytest.fail("it was sent"))
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--config", str(file)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (
            ("drain", "--no-wait"),
            {"action": "drain", "what": "everything", "name": "", "now": False},
        ),
        (
            ("drain", "--no-wait", "--gpu", "a", "--now"),
            {"action": "drain", "what": "card", "name": "a", "now": True},
        ),
        (
            ("drain", "--no-wait", "--node", "b"),
            {"action": "drain", "what": "node", "name": "b", "now": False},
        ),
        (("resume",), {"action": "resume", "what": "everything", "name": ""}),
        (("resume", "--gpu", "a"), {"action": "resume", "what": "card", "name": "a"}),
        (("resume", "--node", "b"), {"action": "resume", "what": "node", "name": "b"}),
        (("fleet", "clear", ADDRESS), {"action": "clear_account", "account": ADDRESS}),
        (("gpus", "clear", "a"), {"action": "clear_quarantine", "card": "a"}),
        (("gpus", "forget-canary"), {"action": "forget_canary", "gpu_class": None}),
        (
            ("gpus", "forget-canary", "X+docker"),
            {"action": "forget_canary", "gpu_class": "X+docker"},
        ),
        (("models", "preload", "base:a/b"), {"action": "preload_model", "model": "base:a/b"}),
        (("models", "drop-everywhere", "lora:a"), {"action": "drop_model", "model": "lora:a"}),
        (("config", "reload"), {"action": "reload_config"}),
        (("config", "log-level", "debug"), {"action": "set_log_level", "level": "debug"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_order_is_passed_as_it_was_typed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    order: dict[str, object],
) -> None:
    orders: list[object] = []

    def perform(_config: object, given: Order) -> str:
        orders.append(given.model_dump(mode="json"))
        return "as asked"

    monkeypatch.setattr(client, "perform", perform)
    monkeypatch.setattr(client, "asking", contextlib.nullcontext)
    monkeypatch.setattr(client, "order_done", perform)
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--config", str(file)])
    assert ended.value.code == 0
    assert orders == [order]


@pytest.mark.parametrize(
    ("refused", "code"),
    [
        ({"b": ClusterError("b: a task uses it")}, 1),
        ({"a": ConfigError("a: unknown"), "b": ClusterError("b: a task uses it")}, 1),
        ({"a": ConfigError("a: unknown"), "c": ConfigError("c: unknown")}, 2),
        ({}, 0),
    ],
)
@pytest.mark.parametrize("verb", ["drop-everywhere", "preload"])
def test_a_model_that_is_refused_keeps_no_other_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    refused: dict[str, ClusterError],
    code: int,
) -> None:
    def order_done(_call: object, given: DropModel | PreloadModel) -> str:
        if (error := refused.get(given.model)) is not None:
            raise error
        return f"{given.model}: done"

    monkeypatch.setattr(client, "asking", contextlib.nullcontext)
    monkeypatch.setattr(client, "order_done", order_done)
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(SystemExit) as ended:
        main(["models", verb, "a", "b", "c", "--config", str(file)])
    assert ended.value.code == code
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{name}: done" for name in "abc" if name not in refused]
    assert said.err.splitlines() == [f"crynux-cluster: {error}" for error in refused.values()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fleet", "clear", "0x1"), "account: "),
        (("models", "preload", "x" * 601), "model: "),
        (("config", "log-level", "loud"), "loud"),
    ],
)
def test_an_order_that_says_nothing_sensible_is_never_sent(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    for name in ("perform", "asking"):
        monkeypatch.setattr(client, name, lambda *_: pytest.fail("it was sent"))
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--config", str(file)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
