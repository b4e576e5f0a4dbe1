"""The stores of many machines, as the coordinator watches them; no Ray is started here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.coordinator import Coordinator
from actors.keeping import StoreReport
from actors.stores import FETCHED_BYTES, MOST_SILENT, RayStores, _Begun, _Member
from cluster.core.types import Gpu, GpuId, GpuState, ModelId, RayNodeId
from cluster.models.keeper import Keeper
from tests.unit.actor_fakes import KIND, until
from tests.unit.test_term import Office, serving

A, B, C = ("lora:acme/a", "lora:acme/b", "lora:acme/c")


def gpu(name: str, node: str) -> Gpu:
    return Gpu(GpuId(name), RayNodeId(node), KIND, simulated=True, state=GpuState.READY)


def report(
    here: set[str],
    failed: dict[str, str] | None = None,
    pid: int = 1,
    events: dict[tuple[str, str], int] | None = None,
    fetched: int = 0,
) -> StoreReport:
    return StoreReport(
        "1+abc", pid, frozenset(here), failed or {}, (), 0, len(here), 0, None, 0, events or {},
        {"hub": fetched},
    )  # fmt: skip


def stores(*reports: StoreReport | None, configured: tuple[str, ...] = (A, B)) -> RayStores:
    made = RayStores(lambda: cast(Keeper, None), "1+abc", configured)
    for number, each in enumerate(reports):
        node = RayNodeId(f"n{number}")
        made._members[node] = _Member(cast("ActorHandle[object]", None), each)
    return made


CARDS = (gpu("g0", "n0"), gpu("g1", "n1"))


def test_a_class_has_what_all_its_machines_have() -> None:
    both = stores(report({A, B}), report({B, C}))
    assert both.here(CARDS) == {ModelId(B)}
    assert both.here(CARDS[:1]) == {ModelId(A), ModelId(B)}
    assert stores(report({A, B}), None).here(CARDS) == frozenset()
    assert both.here(()) == frozenset()


def test_settled_when_each_configured_model_is_there_or_was_tried() -> None:
    assert stores(report({A, B}), report({A}, {B: "401"})).settled(CARDS)
    assert not stores(report({A, B}), report({A})).settled(CARDS)
    assert not stores(report({A, B}), None).settled(CARDS)
    assert not stores(report({A, B})).settled(CARDS)
    assert RayStores(None, "1+abc", (A,)).settled(CARDS)


def test_what_is_still_waited_for_is_named() -> None:
    assert (
        stores(report({A, B}), report({A})).unsettled(CARDS) == f"machine n1: {B} is still to come"
    )
    assert "machine n1: its model store hasn't" in stores(report({A, B}), None).unsettled(CARDS)
    assert stores(report({A, B}), report({A}, {B: "401"})).unsettled(CARDS) == ""


def test_a_store_that_fetches_nothing_is_told() -> None:
    made = stores(report({A}), replace(report(set()), trouble="the store can't be written"))
    assert made.alerts() == (
        "machine n1: its model store fetches nothing: the store can't be written",
    )


class Remote:
    """An actor's handle whose every call has that outcome."""

    def __init__(self, outcome: StoreReport | Exception) -> None:
        self.report = self.want = self
        self.outcome = outcome

    async def _answer(self) -> StoreReport:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def remote(self, *_: object) -> object:
        return self._answer()


@pytest.mark.parametrize(
    "outcome", [ActorDiedError(), replace(report({A}), release="older")], ids=["dead", "old"]
)
@pytest.mark.parametrize("error", [RayError("the node is going away"), ValueError("no such node")])
async def test_a_store_that_cannot_be_replaced_ends_nobodys_run(
    monkeypatch: pytest.MonkeyPatch, outcome: StoreReport | Exception, error: Exception
) -> None:
    made = stores(None)
    node = RayNodeId("n0")
    made._members[node] = _Member(cast("ActorHandle[object]", Remote(outcome)))

    def going_away(_: RayNodeId) -> NoReturn:
        raise error

    monkeypatch.setattr(made, "_actor", going_away)
    monkeypatch.setattr(made, "_kill", lambda _: None)
    await made.refresh([node])
    assert made.reports() == {}
    fresh = Remote(report({A}))
    begun = _Begun(cast("ActorHandle[object]", fresh), is_new=True)
    monkeypatch.setattr(made, "_actor", lambda _: begun)
    await made.refresh([node])
    await made.refresh([node])
    assert made.here(CARDS[:1]) == {ModelId(A)}


async def test_a_store_that_does_not_answer_is_told_until_it_does() -> None:
    made = stores(None)
    node = RayNodeId("n0")
    cause = FileNotFoundError(2, "x\n\x1b[31m")
    broken = Remote(cast(Any, RayTaskError)("report", "a trace\n" * 9, cause))
    made._members[node] = _Member(cast("ActorHandle[object]", broken))
    for look in range(MOST_SILENT):
        assert made.alerts() == (), look
        await made.refresh([node])
    (line,) = made.alerts()
    assert line.startswith("machine n0: its model store doesn't answer: FileNotFoundError: ")
    assert line.isprintable()
    broken.outcome = report({A, B})
    await made.refresh([node])
    assert made.alerts() == ()


@pytest.mark.parametrize("before", [report({A, B}), None], ids=["silent", "never"])
async def test_a_machine_whose_store_does_not_answer_is_in_trouble(
    before: StoreReport | None,
) -> None:
    made, node = stores(before), RayNodeId("n0")
    actor = Remote(RayError("away"))
    made._members[node].actor = cast("ActorHandle[object]", actor)
    for look in range(MOST_SILENT):
        assert not any(each.trouble for each in made.reports().values()), look
        await made.refresh([node])
    found = made.reports()[node]
    assert found.trouble == "it doesn't answer: RayError"
    assert found.models == (0 if before is None else 2)
    # What it said is still what is known of its disk, and saying nothing is no answer.
    assert made.here(CARDS[:1]) == (frozenset() if before is None else {ModelId(A), ModelId(B)})
    assert made.settled(CARDS[:1]) == (before is not None)
    assert len(made.alerts()) == 1
    actor.outcome = report({A, B})
    await made.refresh([node])
    assert made.reports() == {node: report({A, B})}


async def test_a_store_that_cannot_be_begun_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stores()
    node = RayNodeId("n0")

    def full(_: RayNodeId) -> NoReturn:
        raise ValueError("no such node")

    monkeypatch.setattr(made, "_actor", full)
    for _ in range(MOST_SILENT):
        await made.refresh([node])
    assert "machine n0: its model store doesn't answer: it can't be begun" in made.alerts()[0]
    assert "it can't be begun" in made.reports()[node].trouble
    await made.refresh([])
    assert made.alerts() == ()
    assert made.reports() == {}


@pytest.mark.parametrize("is_new", [True, False])
async def test_only_what_a_store_does_under_this_coordinator_is_news(
    monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    made = stores()
    events = {("fetched", "hub"): 2, ("refused", "size"): 1}
    actor = Remote(report({A}, events=events, fetched=10))
    begun = _Begun(cast("ActorHandle[object]", actor), is_new)
    monkeypatch.setattr(made, "_actor", lambda _: begun)
    await made.refresh([RayNodeId("n0")])
    assert made.news() == (events | {(FETCHED_BYTES, "hub"): 10} if is_new else {})
    actor.outcome = report({A}, events=events | {("fetched", "hub"): 3}, fetched=15)
    await made.refresh([RayNodeId("n0")])
    assert made.news() == {("fetched", "hub"): 1, (FETCHED_BYTES, "hub"): 5}


@pytest.mark.parametrize(
    "outcome", [ActorDiedError(), replace(report({A}), release="older")], ids=["dead", "old"]
)
async def test_all_that_a_store_does_that_was_begun_anew_is_news(
    monkeypatch: pytest.MonkeyPatch, outcome: StoreReport | Exception
) -> None:
    made, node = stores(None), RayNodeId("n0")
    made._members[node] = _Member(cast("ActorHandle[object]", Remote(outcome)))
    fresh = Remote(report({A}, pid=2, events={("fetched", "hub"): 1}, fetched=4))
    begun = _Begun(cast("ActorHandle[object]", fresh), is_new=True)
    monkeypatch.setattr(made, "_actor", lambda _: begun)
    monkeypatch.setattr(made, "_kill", lambda _: None)
    await made.refresh([node])
    assert made.news() == {}
    await made.refresh([node])
    assert made.news() == {("fetched", "hub"): 1, (FETCHED_BYTES, "hub"): 4}


def test_news_are_told_once_over_restarts() -> None:
    made = stores(report({A}, events={("fetched", "hub"): 2, ("refused", "size"): 1}, fetched=10))
    assert made.news() == {}  # it ran before this coordinator did
    member = made._members[RayNodeId("n0")]
    member.report = report({A}, events={("fetched", "hub"): 5}, fetched=30)
    assert made.news() == {("fetched", "hub"): 3, (FETCHED_BYTES, "hub"): 20}
    member.report = report({A}, pid=2, events={("fetched", "hub"): 1}, fetched=4)
    assert made.news() == {("fetched", "hub"): 1, (FETCHED_BYTES, "hub"): 4}


async def test_who_lost_the_lease_knows_nothing_of_the_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another coordinator tends them since: what they told this one is of the past."""
    office = Office(tmp_path)
    office.lease_for(0.3)
    node = office.pool.gpus()[0].ray_node
    made = RayStores(lambda: cast(Keeper, None), "1+abc", ())
    told = Remote(replace(report({A}), trouble="the disk is full"))
    begun = _Begun(cast("ActorHandle[object]", told), is_new=True)
    monkeypatch.setattr(made, "_actor", lambda _: begun)
    office.world = replace(office.world, stores=made)
    office.coordinator = Coordinator(office.world, "me")
    async with serving(office):
        await until(lambda: [each.ray_node for each in office.status.stores] == [node])
        office.depose(1000.0)
        await until(lambda: office.closed == 1)
        await until(lambda: not office.status.acting)
        assert office.status.stores == ()
        assert made.alerts() == ()
