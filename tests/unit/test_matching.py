"""Who runs where: examples for every rule, and a slow, plain matcher that must agree."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.matching import Card, Costs, Placement, Want, fits, place
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
COSTS = Costs()
SMALL = GpuClass("NVIDIA GeForce RTX 3090+docker", GigaBytes(24))
TWIN = GpuClass("NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
BIG = GpuClass("NVIDIA H100+docker", GigaBytes(80))
NONE: frozenset[str] = frozenset()


def card(
    gpu_id: str,
    gpu_class: GpuClass = SMALL,
    state: GpuState = GpuState.READY,
    free_at: float | None = None,
    next_warm: str = "",
    warm: str = "",
    host: str = "",
    disk: str = "",
) -> Card:
    """A card; keys are given as words separated by spaces."""
    near = [frozenset(words.split()) for words in (warm, host, disk)]
    gpu = Gpu(GpuId(gpu_id), RayNodeId("n"), gpu_class, False, state, *near)
    when = None if free_at is None else Timestamp(free_at)
    return Card(gpu, when, frozenset(next_warm.split()))


def busy(gpu_id: str, after: float, next_warm: str = "", gpu_class: GpuClass = SMALL) -> Card:
    return card(gpu_id, gpu_class, GpuState.BUSY, NOW + after, next_warm)


def want(
    task: str,
    left: float | None = 150.0,
    seconds: float = 20.0,
    min_vram: int = 8,
    only: GpuClass | None = None,
    pipeline: str = "sd+lora",
    base: str = "sd",
    avoid: str = "",
    outgrown: str = "",
) -> Want:
    requirement = Requirement(GigaBytes(min_vram), "", GigaBytes(0))
    if only is not None:
        requirement = Requirement(GigaBytes(0), only.name, only.vram)
    deadline = None if left is None else Timestamp(NOW + left)
    small = frozenset(map(GpuId, outgrown.split()))
    avoided = small | frozenset(map(GpuId, avoid.split()))
    return Want(Commitment(task), requirement, pipeline, base, deadline, seconds, avoided, small)


def placed(wants: list[Want], cards: list[Card], costs: Costs = COSTS) -> dict[str, str]:
    return {str(p.task): str(p.gpu_id) for p in place(wants, cards, NOW, costs)}


@pytest.mark.parametrize(
    ("requirement", "gpu_class", "expected"),
    [
        (Requirement(GigaBytes(24), "", GigaBytes(0)), SMALL, True),
        (Requirement(GigaBytes(25), "", GigaBytes(0)), SMALL, False),
        (Requirement(GigaBytes(0), SMALL.name, GigaBytes(24)), SMALL, True),
        (Requirement(GigaBytes(0), SMALL.name, GigaBytes(24)), TWIN, False),
        (Requirement(GigaBytes(0), SMALL.name, GigaBytes(23)), SMALL, False),
        # With a required card the minimum isn't looked at.
        (Requirement(GigaBytes(99), SMALL.name, GigaBytes(24)), SMALL, True),
    ],
)
def test_fits(requirement: Requirement, gpu_class: GpuClass, expected: bool) -> None:
    assert fits(requirement, gpu_class) is expected


@pytest.mark.parametrize("state", list(GpuState))
def test_only_a_ready_card_takes_a_task(state: GpuState) -> None:
    expected = {"t": "g"} if state is GpuState.READY else {}
    assert placed([want("t")], [card("g", state=state)]) == expected


def test_a_card_that_is_not_free_yet_takes_none_and_one_that_is_does() -> None:
    assert placed([want("t")], [card("g", free_at=NOW + 1)]) == {}
    assert placed([want("t")], [card("g", free_at=NOW)]) == {"t": "g"}


def test_one_task_a_card() -> None:
    assert placed([want("a"), want("b"), want("c")], [card("g"), card("h")]) == {"a": "g", "b": "h"}


def test_the_nearest_model_then_the_smallest_card_then_the_first() -> None:
    cards = [
        card("a", TWIN),
        card("b", SMALL),
        card("c", BIG, disk="sd"),
        card("d", SMALL, disk="sd"),
        card("e", BIG, host="sd"),
        card("f", BIG, warm="sd+lora"),
    ]
    for best in "fedcab":
        assert placed([want("t")], cards) == {"t": best}
        cards = [c for c in cards if c.gpu.gpu_id != best]


def test_a_warm_base_alone_is_not_warm_and_a_pipeline_on_disk_means_nothing() -> None:
    cards = [card("a", warm="sd"), card("b", host="sd+lora"), card("c", disk="sd")]
    assert placed([want("t")], cards) == {"t": "c"}


def test_least_slack_first() -> None:
    wants = [want("calm", left=None), want("later", left=150), want("soon", left=100)]
    assert placed(wants, [card("g")]) == {"soon": "g"}
    assert placed(wants[:2], [card("g")]) == {"later": "g"}


def test_slack_counts_the_computing_and_the_start() -> None:
    long = want("long", left=150, seconds=80)
    assert placed([want("short", left=140, seconds=20), long], [card("g")]) == {"long": "g"}
    # b has its model on disk somewhere, so a, which must fetch it, is more urgent.
    cards = [card("g", disk="llm")]
    a, b = want("a", left=150, base="sd"), want("b", left=120, base="llm")
    assert placed([a, b], cards) == {"a": "g"}


def test_an_avoided_card_is_left_alone_while_another_fits() -> None:
    avoiding = want("t", avoid="g")
    assert placed([avoiding], [card("g", warm="sd+lora"), card("h")]) == {"t": "h"}
    assert placed([avoiding], [card("g"), busy("h", 30)]) == {}
    assert placed([avoiding], [card("g"), card("h", state=GpuState.QUARANTINED)]) == {"t": "g"}
    small_only = want("t", only=SMALL, avoid="g")
    assert placed([small_only], [card("g"), card("h", BIG)]) == {"t": "g"}
    assert placed([want("t", avoid="g gone")], [card("g")]) == {"t": "g"}


def test_a_short_wait_for_a_warm_card_beats_a_cold_start() -> None:
    cards = [card("cold"), busy("warm", 59, "sd+lora")]
    assert placed([want("t")], cards) == {}
    assert placed([want("t")], [card("cold"), busy("warm", 60, "sd+lora")]) == {"t": "cold"}
    assert placed([want("t")], [card("host", host="sd"), busy("warm", 5, "sd+lora")]) == {
        "t": "host"
    }
    assert placed([want("t")], [card("cold"), busy("warm", 5, "other")]) == {"t": "cold"}


def test_a_task_that_outgrew_a_card_goes_to_a_larger_one() -> None:
    small, twin, middle, big = (
        card("a", SMALL),
        card("b", TWIN, warm="sd+lora"),
        card("c", GpuClass("Middle", GigaBytes(40))),
        card("d", BIG),
    )
    cards = [small, twin, middle, big]
    assert placed([want("t", outgrown="a")], cards) == {"t": "c"}
    assert placed([want("t", outgrown="a c")], cards) == {"t": "d"}
    # A larger one that failed otherwise goes last among the larger.
    assert placed([want("t", outgrown="a", avoid="c")], cards) == {"t": "d"}
    assert placed([want("t", outgrown="a", avoid="d")], [small, twin, big]) == {"t": "d"}


def test_a_task_that_outgrew_a_card_waits_for_a_larger_one_that_is_alive() -> None:
    cards = [card("a"), card("b")]
    outgrown = want("t", outgrown="a")
    assert placed([outgrown], [*cards, busy("d", 30, gpu_class=BIG)]) == {}
    assert placed([outgrown], [*cards, card("d", BIG, GpuState.UNREACHABLE)]) == {"t": "b"}
    # How large a card is doesn't change when it goes out of reach.
    away = card("a", state=GpuState.UNREACHABLE)
    assert placed([outgrown], [away, card("b", TWIN), card("d", BIG)]) == {"t": "d"}


def test_without_a_larger_card_a_task_goes_where_it_was_not_tried_and_then_anywhere() -> None:
    cards = [card("a", warm="sd+lora"), card("b", TWIN)]
    assert placed([want("t", outgrown="a")], cards) == {"t": "b"}
    assert placed([want("t", outgrown="a b")], cards) == {"t": "a"}
    assert placed([want("t", only=SMALL, outgrown="a")], [cards[0], card("d", BIG)]) == {"t": "a"}
    assert placed([want("t", outgrown="gone")], cards) == {"t": "a"}


def test_nobody_waits_past_the_deadline_or_for_an_avoided_card() -> None:
    cards = [card("cold"), busy("warm", 40, "sd+lora")]
    assert placed([want("t", left=61)], cards) == {}
    assert placed([want("t", left=59)], cards) == {"t": "cold"}
    assert placed([want("t", avoid="warm")], cards) == {"t": "cold"}


def test_a_busy_card_is_waited_for_by_one() -> None:
    cards = [card("cold"), busy("warm", 10, "sd+lora")]
    assert placed([want("a", left=100), want("b", left=110)], cards) == {"b": "cold"}


def test_a_task_that_is_too_late_leaves_the_card_to_one_that_is_not() -> None:
    late, other = want("late", left=30, seconds=40), want("fine", left=150)
    assert placed([late, other], [card("g", warm="sd+lora")]) == {"fine": "g"}
    assert placed([late, other], [card("g"), card("h")]) == {"fine": "g", "late": "h"}
    assert placed([late], [card("g")]) == {"late": "g"}
    llm = want("llm", only=BIG)
    assert placed([late, llm], [card("g", SMALL)]) == {"late": "g"}


def test_the_costs_are_the_callers() -> None:
    cards = [card("disk", BIG, disk="sd"), card("net", SMALL)]
    assert placed([want("t")], cards, Costs(from_disk=10.0, from_network=10.0)) == {"t": "net"}


# --- against a plain matcher --------------------------------------------------------------------


def _usable(c: Card) -> bool:
    return c.gpu.state in {GpuState.READY, GpuState.BUSY}


def _free(c: Card) -> bool:
    return c.gpu.state is GpuState.READY and (c.free_at is None or c.free_at <= NOW)


def _cost(w: Want, c: Card) -> float:
    if not _free(c):
        warm = w.pipeline in c.next_warm and c.free_at is not None
        return max((c.free_at or NOW) - NOW, 0.0) + COSTS.warm if warm else math.inf
    if w.pipeline in c.gpu.warm:
        return COSTS.warm
    if w.base in c.gpu.in_host_memory:
        return COSTS.from_host
    return COSTS.from_disk if w.base in c.gpu.on_disk else COSTS.from_network


def _slack(w: Want, cost: float) -> float:
    return math.inf if w.deadline is None else w.deadline - NOW - cost - w.compute_seconds


def _candidates(w: Want, cards: list[Card]) -> list[Card]:
    could = [c for c in cards if _usable(c) and fits(w.requirement, c.gpu.gpu_class)]
    floor = max((c.gpu.gpu_class.vram for c in cards if c.gpu.gpu_id in w.outgrown), default=0)
    could = [c for c in could if c.gpu.gpu_class.vram > floor] or could
    return [c for c in could if c.gpu.gpu_id not in w.avoid] or could


def _choice(w: Want, cards: list[Card], taken: set[GpuId]) -> Card | None:
    def rank(c: Card) -> tuple[float, bool, int, GpuId]:
        return (_cost(w, c), not _free(c), c.gpu.gpu_class.vram, c.gpu.gpu_id)

    left = [c for c in _candidates(w, cards) if c.gpu.gpu_id not in taken]
    left = [c for c in left if _free(c) or _slack(w, _cost(w, c)) >= 0]
    return min((c for c in left if _cost(w, c) < math.inf), key=rank, default=None)


def plain(wants: list[Want], cards: list[Card]) -> set[Placement]:
    """What `place` promises, looking at every card for every want."""
    ways = [(w, c) for w in wants if (c := _choice(w, cards, set())) is not None]
    ways.sort(key=lambda way: (_slack(way[0], _cost(*way)), way[0].task))
    taken: set[GpuId] = set()
    chosen: set[Placement] = set()
    late = []
    for w, _ in ways:
        c = _choice(w, cards, taken)
        if c is not None and _slack(w, _cost(w, c)) < 0:
            late.append(w)
        elif c is not None:
            taken.add(c.gpu.gpu_id)
            chosen |= {Placement(w.task, c.gpu.gpu_id)} if _free(c) else set()
    for w in late:
        c = _choice(w, [c for c in cards if _free(c) or c.gpu.gpu_id in taken], taken)
        # Avoidance is about the whole cluster, not about what is left of it.
        c = c if c in _candidates(w, cards) else None
        if c is not None:
            taken.add(c.gpu.gpu_id)
            chosen.add(Placement(w.task, c.gpu.gpu_id))
    return chosen


keys = st.sampled_from(["", "sd", "sd+lora", "llm", "sd sd+lora llm"])
ids = st.integers(0, 9).map(lambda n: f"g{n}")
cards_strategy = st.lists(
    st.builds(
        card,
        gpu_id=ids,
        gpu_class=st.sampled_from([SMALL, TWIN, BIG]),
        state=st.sampled_from([*GpuState, GpuState.READY, GpuState.READY, GpuState.BUSY]),
        free_at=st.none() | st.sampled_from([NOW - 1, NOW, NOW + 1, NOW + 5, NOW + 30]),
        next_warm=keys,
        warm=keys,
        host=keys,
        disk=keys,
    ),
    max_size=8,
    unique_by=lambda c: c.gpu.gpu_id,
)
wants_strategy = st.lists(
    st.builds(
        want,
        task=st.integers(0, 20).map(lambda n: f"0x{n:02}"),
        left=st.none() | st.sampled_from([-5.0, 10.0, 25.0, 31.0, 60.0, 90.0, 150.0]),
        seconds=st.sampled_from([5.0, 20.0, 40.0]),
        min_vram=st.sampled_from([8, 24, 40, 99]),
        only=st.none() | st.sampled_from([SMALL, TWIN, BIG]),
        pipeline=st.sampled_from(["sd+lora", "llm"]),
        base=st.sampled_from(["sd", "llm"]),
        avoid=st.lists(ids, max_size=3).map(" ".join),
        outgrown=st.just("") | st.lists(ids, max_size=2).map(" ".join),
    ),
    max_size=8,
    unique_by=lambda w: w.task,
)


@given(wants_strategy, cards_strategy, st.randoms(use_true_random=False))
def test_any_placement_is_a_right_one(wants, cards, chance) -> None:  # type: ignore[no-untyped-def]
    placements = place(wants, cards, NOW)
    assert len({p.gpu_id for p in placements}) == len(placements)
    assert len({p.task for p in placements}) == len(placements)
    by_task, by_id = {w.task: w for w in wants}, {c.gpu.gpu_id: c for c in cards}
    for placement in placements:
        w, c = by_task[placement.task], by_id[placement.gpu_id]
        assert fits(w.requirement, c.gpu.gpu_class) and _free(c)
        assert c in _candidates(w, cards)
    chance.shuffle(wants)
    chance.shuffle(cards)
    assert place(wants, cards, NOW) == placements


@given(wants_strategy, cards_strategy)
def test_it_agrees_with_the_plain_matcher(wants: list[Want], cards: list[Card]) -> None:
    assert set(place(wants, cards, NOW)) == plain(wants, cards)


@given(wants_strategy, cards_strategy)
def test_no_card_idles_beside_a_task_that_has_no_wait(wants: list[Want], cards: list[Card]) -> None:
    """Where nothing is worth waiting for, a free card that fits an unplaced task is never left."""
    still = [c for c in cards if _free(c)]
    done = place(wants, still, NOW)
    used, tasks = {p.gpu_id for p in done}, {p.task for p in done}
    for w in wants:
        if w.task not in tasks:
            assert all(c.gpu.gpu_id in used for c in _candidates(w, still))


class CountedId(str):
    """A GPU's id that counts how often it is looked up: a look at a card is one."""

    looks = 0

    def __hash__(self) -> int:
        CountedId.looks += 1
        return super().__hash__()


def test_a_task_looks_at_a_few_shelves_and_never_at_every_card() -> None:
    classes = [SMALL, TWIN, BIG]

    def looks(count: int) -> int:
        """At cards, to place five wants for each of so many."""
        cards = [
            card(
                CountedId(f"g{n:04}"),
                classes[n % 3],
                warm=f"p{n % 50}",
                host=f"b{n % 20}",
                disk="b1 b2 b3",
            )
            for n in range(count)
        ]
        wants = [
            want(
                f"0x{n:04}",
                left=100 + n % 83,
                pipeline=f"p{n % 60}",
                base=f"b{n % 25}",
                avoid=f"g{n % count:04}",
            )
            for n in range(5 * count)
        ]
        CountedId.looks = 0
        assert len(place(wants, cards, NOW)) == count
        return CountedId.looks

    few, many = looks(250), looks(1000)
    assert 0 < few < 250 * 250, "fewer than one look of each want at one card in five"
    assert many < 5 * few, "four times as much of everything, not sixteen"
