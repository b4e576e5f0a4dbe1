"""Who reads ahead for whom."""

from __future__ import annotations

from cluster.core.matching import Card, Placement, Want
from cluster.core.prefetching import hints
from cluster.core.types import (
    Commitment,
    GigaBytes,
    Gpu,
    GpuClass,
    GpuId,
    GpuState,
    RayNodeId,
    Requirement,
    Timestamp,
)

NOW = Timestamp(1000.0)
ANY = Requirement(GigaBytes(8), "", GigaBytes(0))


def card(
    name: str,
    free_at: float | None = None,
    state: GpuState = GpuState.BUSY,
    vram: int = 8,
    warm: str = "",
    host: str = "",
    soon: str = "",
) -> Card:
    gpu = Gpu(
        GpuId(name),
        RayNodeId("node"),
        GpuClass("Card+docker", GigaBytes(vram)),
        False,
        state,
        warm=frozenset(warm.split()),
        in_host_memory=frozenset(host.split()),
    )
    at = None if free_at is None else Timestamp(free_at)
    return Card(gpu, at, frozenset(soon.split()))


def want(task: str, pipeline: str = "p", deadline: float = 1100.0, avoid: str = "") -> Want:
    shunned = frozenset(GpuId(name) for name in avoid.split())
    return Want(Commitment(task), ANY, pipeline, "base", Timestamp(deadline), 1.0, shunned)


def test_the_card_that_is_free_soonest_reads() -> None:
    cards = [card("late", 1020.0), card("soon", 1010.0)]
    assert hints([want("t")], cards, NOW) == (Placement(Commitment("t"), GpuId("soon")),)


def test_nothing_is_read_that_is_near_already() -> None:
    for near in (
        card("a", 1010.0, warm="p"),
        card("a", 1010.0, host="base"),
        card("a", 1010.0, soon="p"),
    ):
        assert hints([want("t")], [near, card("b", 1001.0)], NOW) == ()


def test_the_most_urgent_goes_first_and_a_card_reads_for_one() -> None:
    wants = [want("later", "q", 1200.0), want("urgent", "p", 1050.0)]
    assert hints(wants, [card("a", 1010.0)], NOW) == (Placement(Commitment("urgent"), GpuId("a")),)
    two = hints(wants, [card("a", 1010.0), card("b", 1020.0)], NOW)
    assert two == (
        Placement(Commitment("urgent"), GpuId("a")),
        Placement(Commitment("later"), GpuId("b")),
    )


def test_no_hint_for_cards_that_dont_serve_it() -> None:
    dead = [card("a", state=state) for state in (GpuState.UNREACHABLE, GpuState.QUARANTINED)]
    assert hints([want("t")], [*dead, card("small", 1001.0, vram=4)], NOW) == ()
    assert hints([want("t", avoid="a")], [card("a", 1001.0)], NOW) == ()


def test_without_wants_or_cards_there_is_nothing_to_read() -> None:
    assert hints([], [card("a")], NOW) == ()
    assert hints([want("t")], [], NOW) == ()
