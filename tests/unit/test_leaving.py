"""A machine that goes away: its cards finish what they have and get nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
from click.testing import CliRunner

from actors import client
from actors.inference import Health
from cluster.cli import cli
from cluster.cli.leave import SILENT_SECONDS, _wait_empty
from cluster.core.errors import ClusterError
from cluster.core.types import GpuState, RayNodeId
from tests.unit.test_client import FakeRay
from tests.unit.test_pool import READY, A, Pool, node, nodes

__all__ = ["nodes"]  # the fixture
ONE, OTHER = RayNodeId("a" * 56), RayNodeId("b" * 56)


async def two_machines(nodes: list[dict[str, Any]]) -> Pool:
    nodes[:] = [node({"GPU": 1.0}, ONE), node({"GPU": 1.0}, OTHER)]
    pool = Pool()
    await pool.refresh()
    return pool


async def test_the_cards_of_a_machine_that_leaves_get_nothing_new(
    nodes: list[dict[str, Any]],
) -> None:
    pool = await two_machines(nodes)
    assert pool.leave(ONE) == 0
    assert {gpu.ray_node: gpu.state for gpu in pool.gpus()} == {
        ONE: GpuState.DRAINED,
        OTHER: GpuState.READY,
    }


async def test_what_still_computes_is_counted_on_that_machine_only(
    nodes: list[dict[str, Any]],
) -> None:
    pool = await two_machines(nodes)
    for actor in pool.made:
        actor.answers["report"] = [replace(READY, health=Health.BUSY, attempt=A)]
    await pool.refresh()
    assert pool.leave(ONE) == 1
    assert pool.leave(None) == 2
    assert {gpu.state for gpu in pool.gpus()} == {GpuState.DRAINED}


async def test_a_machine_that_comes_in_its_place_works(nodes: list[dict[str, Any]]) -> None:
    pool = await two_machines(nodes)
    pool.leave(ONE)
    nodes[0] = node({"GPU": 1.0}, "c" * 56)
    await pool.refresh()
    assert {gpu.state for gpu in pool.gpus()} == {GpuState.READY}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def waited(looks: Iterator[int | ClusterError], timeout: float) -> tuple[int, float]:
    clock = Clock()

    def look() -> int:
        found = next(looks)
        if isinstance(found, ClusterError):
            raise found
        return found

    return _wait_empty(look, timeout, clock.sleep, clock), clock.now


def test_it_waits_until_nothing_computes_for_some_looks() -> None:
    # What was just begun may not be seen by the first look at nothing.
    assert waited(iter([0, 1, 1, 0, 0, 0]), timeout=100.0) == (0, 6.0)


def test_it_gives_up_when_the_time_is_over() -> None:
    code, seconds = waited(iter([1] * 100), timeout=5.0)
    assert code == 1
    assert seconds == 5.0


def test_a_coordinator_that_comes_back_is_waited_for() -> None:
    away = ClusterError("it doesn't answer")
    assert waited(iter([1, away, away, 0, 0, 0]), timeout=100.0)[0] == 0


def test_one_that_stays_away_is_not_waited_for_until_the_timeout() -> None:
    away = ClusterError("it doesn't answer")
    with pytest.raises(ClusterError, match="doesn't answer"):
        waited(iter([away] * int(2 * SILENT_SECONDS)), timeout=10 * SILENT_SECONDS)


class Nodes(FakeRay):
    """Ray with two machines, the first of them the head; this process is on machine `here`."""

    here = ONE

    def nodes(self) -> list[dict[str, Any]]:
        return [node({"GPU": 1.0}, OTHER), node({client.HEAD: 1.0}, ONE)]

    def get_runtime_context(self) -> Nodes:
        return self

    def get_node_id(self) -> str:
        return self.here


@pytest.mark.parametrize(("here", "asked"), [(ONE, None), (OTHER, OTHER)])
def test_the_command_empties_its_machine_and_the_head_all(
    monkeypatch: pytest.MonkeyPatch, here: RayNodeId, asked: str | None
) -> None:
    monkeypatch.setattr(import_module("cluster.cli.leave"), "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(client, "_reach", lambda _: None)
    fake = Nodes(monkeypatch, leave=0)
    monkeypatch.setattr(fake, "here", here)
    done = CliRunner().invoke(
        cli, ["leave", "--address", "10.0.0.1:6379", "--namespace", "n"], standalone_mode=False
    )
    assert (done.return_value, done.output.splitlines()[-1]) == (0, "empty")
    assert set(fake.asked) == {(asked,)}
    assert fake.joined[0]["address"] == "10.0.0.1:6379"
    assert fake.joined[0]["namespace"] == "n"
