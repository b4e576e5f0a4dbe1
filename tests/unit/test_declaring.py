from __future__ import annotations

from cluster.core.declaring import reports
from cluster.core.types import (
    AccountFacts,
    AccountView,
    Address,
    GigaBytes,
    GpuClass,
    ModelId,
    NodeStatus,
    Timestamp,
    Wei,
)

BIG, SMALL = GpuClass("big", GigaBytes(80)), GpuClass("small", GigaBytes(8))
A, B = Address("0xa"), Address("0xb")
X, Y, Z = (ModelId(f"base:{name}") for name in "xyz")


def view(
    address: Address,
    gpu_class: GpuClass | None = BIG,
    status: NodeStatus = NodeStatus.AVAILABLE,
    models: frozenset[ModelId] = frozenset(),
) -> AccountView:
    facts = AccountFacts(address, status, gpu_class, Wei(1), Wei(1), 0, None, models)
    return AccountView(1, Timestamp(0.0), facts, ())


def test_one_report_for_each_account_that_lacks_one() -> None:
    here = {BIG: {Y, X}, SMALL: {Z}}
    assert reports([view(A), view(B, SMALL)], here, ()) == ((A, X), (B, Z))


def test_what_is_declared_or_sent_is_not_said_again() -> None:
    here = {BIG: {X, Y, Z}}
    assert reports([view(A, models=frozenset({X}))], here, {(A, Y)}) == ((A, Z),)
    assert reports([view(A, models=frozenset({X, Z}))], here, {(A, Y)}) == ()


def test_only_accounts_that_take_tasks_declare() -> None:
    here = {BIG: {X}}
    speaking = {
        status for status in NodeStatus if reports([view(A, status=status)], here, ()) != ()
    }
    assert speaking == {NodeStatus.AVAILABLE, NodeStatus.BUSY}
    assert reports([view(A, None)], here, ()) == ()
    assert reports([view(A, SMALL)], here, ()) == ()


def test_who_has_something_else_on_its_way_waits_with_it() -> None:
    here = {BIG: {X}}
    assert reports([view(A), view(B)], here, (), {A}) == ((B, X),)
