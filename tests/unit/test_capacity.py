"""From cards, slots and load to how many accounts a class should have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.capacity import (
    FEW,
    NO_LIMIT,
    NONE,
    Cards,
    Cycle,
    Load,
    Measured,
    Target,
    counted,
    limit_for,
    measured,
    parsed,
    slots_for,
    target,
    text,
)
from cluster.core.types import GigaBytes, GpuClass, Timestamp

BIG = GpuClass("NVIDIA H100+docker", GigaBytes(80))
SMALL = GpuClass("NVIDIA L4+docker", GigaBytes(24))
PATIENCE = 120.0


def count(cards: Cards, here: dict[GpuClass, int], at: float, settled: bool = True) -> Cards:
    return counted(cards, here, Timestamp(at), PATIENCE, settled)


def test_a_card_that_is_gone_for_a_short_while_is_kept() -> None:
    cards = count(Cards(), {BIG: 3}, 0)
    assert (cards.here, cards.kept) == ({BIG: 3}, {BIG: 3})
    cards = count(cards, {BIG: 1}, 10)
    assert (cards.here[BIG], cards.kept[BIG]) == (1, 3)
    back = count(cards, {BIG: 3}, 20)
    assert (back.kept[BIG], back.fewer_since) == (3, {})
    cards = count(cards, {BIG: 1}, 10 + PATIENCE)
    assert cards.kept[BIG] == 1
    assert count(count(cards, {}, 200), {}, 200 + PATIENCE).kept == {}


def test_one_that_is_gone_again_is_waited_for_again() -> None:
    cards = count(count(count(Cards(), {BIG: 2}, 0), {BIG: 1}, 100), {BIG: 2}, 150)
    assert count(count(cards, {BIG: 1}, 200), {BIG: 1}, 300).kept[BIG] == 2


def test_as_long_as_the_cluster_isnt_known_nothing_is_given_up() -> None:
    cards = Cards({}, {BIG: 2}, {})
    for at in (0.0, 1000.0):
        cards = count(cards, {}, at, settled=False)
        assert cards.kept == {BIG: 2}


# --- slots ----------------------------------------------------------------------------------------


def cycle(compute: float, network: float) -> Cycle:
    return Cycle(compute, network, FEW)


@pytest.mark.parametrize(
    ("compute", "network", "slots"),
    [(4.0, 0.1, 1), (4.0, 4.0, 2), (4.0, 12.0, 4), (4.0, 13.0, 5), (1.0, 100.0, 8)],
)
def test_as_many_slots_as_keep_the_card_busy(compute: float, network: float, slots: int) -> None:
    assert slots_for(cycle(compute, network), 1, 8) == slots


def test_one_slot_until_it_was_measured() -> None:
    assert slots_for(Cycle(), 1, 8) == 1
    assert slots_for(replace(cycle(1, 9), tasks=FEW - 1), 1, 8) == 1
    assert slots_for(replace(cycle(1, 9), compute=0.0), 3, 8) == 3


def test_a_measurement_that_wavers_changes_nothing() -> None:
    for network in (8.0, 10.0, 12.0, 12.9):
        assert slots_for(cycle(4.0, network), 4, 8) == 4


@given(st.floats(0.1, 100), st.floats(0, 1000), st.integers(1, 8), st.integers(1, 8))
def test_slots_come_to_rest_and_stay_in_bounds(
    compute: float, network: float, present: int, most: int
) -> None:
    slots = slots_for(cycle(compute, network), present, most)
    assert 1 <= slots <= most
    assert slots_for(cycle(compute, network), slots, most) == slots


def test_a_mean_follows_what_is_measured() -> None:
    found = measured(Cycle(), 4.0, 10.0)
    assert found == Cycle(4.0, 10.0, 1)
    for _ in range(50):
        found = measured(found, 8.0, 0.0)
    assert found.compute == pytest.approx(8.0, abs=0.1)
    assert found.network == pytest.approx(0.0, abs=0.1)


def test_what_was_measured_travels_as_text() -> None:
    for each in (Measured(), Measured(Cycle(4.5, 12.25, 7), 4)):
        assert parsed(text(BIG, each)) == (BIG, each)


# --- load and targets -----------------------------------------------------------------------------


def test_too_much_load_takes_an_account_away_and_little_gives_it_back() -> None:
    heavy, fair, light = Load(0.9, 4), Load(0.6, 4), Load(0.1, 1)
    assert limit_for(None, fair, 4) is None
    limit = limit_for(None, heavy, 4)
    assert limit == 3
    assert limit_for(limit, heavy, 3) == 2
    assert limit_for(1, heavy, 1) == 1
    assert limit_for(2, fair, 2) == 2
    assert limit_for(2, light, 2) == 3
    # One more is let in at a time; felt no longer, it goes.
    assert limit_for(3, light, 2) is None
    assert limit_for(None, Load(2.0, 0), 4) is None


CARDS = Cards({BIG: 1}, {BIG: 2, SMALL: 1})


def test_a_target_is_what_is_here_to_what_may_come_back() -> None:
    assert target(CARDS, BIG, 2, None) == Target(2, 4)
    assert target(CARDS, SMALL, 2, None) == Target(0, 2)
    assert target(CARDS, BIG, 2, 3) == Target(2, 3)
    assert target(CARDS, BIG, 2, 1) == Target(1, 1)
    assert target(CARDS, BIG, 2, None, settled=False) == Target(2, NO_LIMIT)


def test_more_than_is_sure_to_be_too_much_is_not_too_much() -> None:
    """One slot as far as is known, and up to four may yet turn out to be right."""
    assert target(CARDS, BIG, 1, None, most_slots=4) == Target(1, 8)
    assert target(CARDS, BIG, 5, None, most_slots=4) == Target(5, 10)
    assert target(Cards(), BIG, 1, None, most_slots=4) == NONE


def test_stopped_and_drained_nothing_serves() -> None:
    assert target(CARDS, BIG, 2, None, stopped={BIG}) == NONE
    assert target(CARDS, SMALL, 2, None, stopped={BIG}) == Target(0, 2)
    assert target(CARDS, BIG, 2, None, drained=True, settled=False) == NONE
