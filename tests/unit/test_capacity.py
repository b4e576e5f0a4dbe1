"""From cards, slots and load to how many accounts a class should have."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.capacity import (
    FEW,
    HIGH,
    NO_LIMIT,
    NONE,
    Cards,
    Cycle,
    Limit,
    Load,
    Measured,
    Target,
    counted,
    limited,
    measured,
    parsed,
    share_of,
    slots_for,
    target,
    text,
    window_of,
)
from cluster.core.types import Commitment, GigaBytes, GpuClass, Timestamp

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
    assert (back.kept[BIG], back.gone) == (3, {})
    cards = count(cards, {BIG: 1}, 10 + PATIENCE)
    assert cards.kept[BIG] == 1
    assert count(count(cards, {}, 200), {}, 200 + PATIENCE).kept == {}


def test_one_that_is_gone_again_is_waited_for_again() -> None:
    cards = count(count(count(Cards(), {BIG: 2}, 0), {BIG: 1}, 100), {BIG: 2}, 150)
    assert count(count(cards, {BIG: 1}, 200), {BIG: 1}, 300).kept[BIG] == 2


def test_of_cards_that_leave_in_turn_only_what_is_missing_all_the_time_is_given_up() -> None:
    """As machines do when they are begun anew in turn: each is away for a while, and before the
    last is back the next is gone."""
    cards, kept = count(Cards(), {BIG: 8}, 0), []
    for at in range(10, 1000, 10):
        away = 2 if at % 60 == 0 else 1
        cards = count(cards, {BIG: 8 - away}, at)
        kept.append(cards.kept[BIG])
    assert set(kept) == {8, 7}
    assert kept == sorted(kept, reverse=True)


def test_as_long_as_the_cluster_isnt_known_nothing_is_given_up() -> None:
    cards = Cards({BIG: 2})
    for at in (0.0, 1000.0):
        cards = count(cards, {}, at, settled=False)
        assert cards.kept == {BIG: 2}


# --- slots ----------------------------------------------------------------------------------------


def cycle(compute: float, network: float) -> Cycle:
    return Cycle(compute, network, FEW)


@pytest.mark.parametrize(
    ("compute", "network", "slots"),
    [(4.0, 0.1, 1), (4.0, 1.0, 2), (4.0, 4.0, 3), (4.0, 12.0, 6), (4.0, 13.0, 7), (1.0, 100.0, 8)],
)
def test_as_many_slots_as_keep_the_card_busy(compute: float, network: float, slots: int) -> None:
    assert slots_for(cycle(compute, network), 1, 8) == slots


def test_one_slot_until_it_was_measured() -> None:
    assert slots_for(Cycle(), 1, 8) == 1
    assert slots_for(replace(cycle(1, 9), tasks=FEW - 1), 1, 8) == 1
    assert slots_for(replace(cycle(1, 9), compute=0.0), 3, 8) == 3


def test_a_measurement_that_wavers_changes_nothing() -> None:
    for network in (4.0, 5.0, 6.0, 7.2):
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
    for each in (Measured(), Measured(Cycle(4.5, 12.25, 7), 4, 3)):
        assert parsed(text(BIG, each)) == (BIG, each)


# --- load and targets -----------------------------------------------------------------------------


A, B, C = (Commitment(f"0x{n}") for n in range(3))


def test_what_is_urgent_is_done_first_so_each_waits_only_for_what_is_more_urgent() -> None:
    assert share_of([], 1) == 0.0
    # 5 s of a running task, then 60 s of one that has time.
    assert share_of([(5.0, 60.0), (60.0, 175.0)], 1) == pytest.approx(65 / 175)
    assert share_of([(60.0, 175.0), (5.0, 60.0)], 1) == pytest.approx(65 / 175)
    assert share_of([(50.0, 60.0), (50.0, 175.0)], 1) == pytest.approx(50 / 60)
    assert share_of([(60.0, 100.0), (60.0, 100.0)], 1) == pytest.approx(1.2)
    assert share_of([(60.0, 100.0), (60.0, 100.0)], 2) == pytest.approx(0.6)
    assert share_of([(3.0, -5.0)], 1) == pytest.approx(3.0)


TASKS = st.lists(st.tuples(st.floats(0, 300), st.floats(1, 300)), max_size=12)


@given(TASKS, st.integers(1, 4))
def test_a_load_that_makes_no_task_late_pauses_nobody(
    tasks: list[tuple[float, float]], cards: int
) -> None:
    free = [0.0] * cards
    for seconds, slack in sorted(tasks, key=lambda each: each[1]):
        free.sort()
        free[0] += seconds
        if free[0] > HIGH * slack:
            return  # late, or nearly
    load = Load(share_of(tasks, cards), frozenset({A}))
    assert limited(Limit(), load, 9, 1, 9, NOW, WINDOW) == Limit()


NOW, WINDOW = Timestamp(1000.0), 120.0


def after(limit: Limit, share: float, serving: int, seconds: float, *tasks: Commitment) -> Limit:
    """So many seconds later, with one card and eight accounts wanted."""
    load = Load(share, frozenset(tasks))
    return limited(limit, load, serving, 1, 8, Timestamp(NOW + seconds), WINDOW)


def test_too_much_load_takes_one_account_away_and_waits_what_comes_of_it() -> None:
    assert after(Limit(), 0.7, 4, 0, A) == Limit()
    first = after(Limit(), 0.9, 4, 0, A, B)
    assert first.accounts == 3
    assert after(first, 2.0, 3, 30, B, C).accounts == 3
    # Those that came meanwhile had to wait for them: they say as little.
    second = after(first, 2.0, 3, 60, C)
    assert second.accounts == 3
    assert after(second, 2.0, 3, 70, A, C).accounts == 3
    assert after(second, 2.0, 4, 80, A).accounts == 3, "the pause is still on its way"
    assert after(second, 0.9, 3, 80, A).accounts == 2


def test_what_is_far_too_much_takes_away_what_is_too_many_but_half_at_most() -> None:
    assert after(Limit(), 1.2, 8, 0, A).accounts == 6
    assert after(Limit(), 1.8, 8, 0, A).accounts == 4
    assert after(Limit(), 50.0, 8, 0, A).accounts == 4
    assert after(Limit(), 50.0, 3, 0, A).accounts == 1


def test_a_window_is_long_enough_to_see_every_account_at_its_busiest() -> None:
    assert window_of(Cycle()) == WINDOW
    assert window_of(Cycle(100.0, 30.0, 9)) == 260.0


def test_accounts_that_have_a_card_each_wait_for_no_other() -> None:
    load = Load(2.0, frozenset({A}))
    assert limited(Limit(), load, 4, 4, 8, NOW, WINDOW) == Limit()
    low = limited(Limit(), load, 5, 4, 8, NOW, WINDOW)
    assert low.accounts == 4
    # And when there are more cards than there were, all of them get one at once.
    assert limited(low, load, 4, 6, 8, NOW, WINDOW).accounts == 6


def test_room_gives_one_account_back_once_it_was_there_for_long() -> None:
    low = after(Limit(), 0.9, 4, 0, A)
    assert after(low, 0.0, 3, WINDOW + 1, A).accounts == 3, "still at it"
    done = after(low, 0.5, 3, 10, B)
    assert after(done, 0.0, 3, WINDOW - 1).accounts == 3
    # With a fourth 0.5 becomes 0.67, which is well; 0.62 would become 0.83.
    assert after(done, 0.0, 3, WINDOW + 10).accounts == 4
    peak = after(done, 0.62, 3, 20, B)
    again = after(peak, 0.0, 3, WINDOW + 10)
    assert again.accounts == 3
    # The next window is another one.
    assert after(again, 0.0, 3, 2 * WINDOW + 20).accounts == 4


def test_the_limit_goes_only_when_all_that_are_wanted_serve() -> None:
    slow = after(Limit(6, NOW), 0.0, 5, WINDOW)
    assert slow.accounts == 6, "the sixth isn't there yet"
    assert after(slow, 0.0, 5, 2 * WINDOW).accounts == 6
    more = after(slow, 0.0, 6, 2 * WINDOW)
    assert more.accounts == 7
    assert after(more, 0.0, 6, 3 * WINDOW).accounts == 7
    assert after(more, 0.0, 7, 3 * WINDOW) == Limit()


def simulated(
    accounts: int, compute: float, network: float, timeout: float
) -> tuple[list[int], int]:
    """An hour of one card, every account always getting its next task: the limits that were set,
    and how many tasks were late."""
    limit, late = Limit(), 0
    limits: list[int] = []
    idle_until = {n: n * compute / 2 for n in range(accounts)}
    waiting: dict[int, tuple[float, float]] = {}
    """What is left to compute, and the deadline, by account."""
    paused: set[int] = set()
    for second in range(3600):
        for n, until in list(idle_until.items()):
            if until <= second and n not in paused:
                del idle_until[n]
                waiting[n] = (compute, second + timeout)
        if waiting:
            n, (left, deadline) = min(waiting.items(), key=lambda each: each[1][1])
            waiting[n] = (left - 1, deadline)
            if left <= 1:
                del waiting[n]
                late += second > deadline
                idle_until[n] = second + network
        tasks = [(left, deadline - second) for left, deadline in waiting.values()]
        names = frozenset(Commitment(f"{n} {waiting[n][1]}") for n in waiting)
        serving, before = accounts - len(paused), limit.accounts
        load = Load(share_of(tasks, 1), names)
        limit = limited(limit, load, serving, 1, accounts, Timestamp(second), WINDOW)
        if limit.accounts != before:
            limits.append(limit.accounts or accounts)
        paused = set(range(limit.accounts or accounts, accounts))
    return limits, late


def test_a_card_that_keeps_up_with_two_accounts_pauses_neither() -> None:
    assert simulated(2, compute=60, network=5, timeout=180) == ([], 0)


@pytest.mark.parametrize(
    ("accounts", "compute"), [(8, 40), (2, 100), (3, 50), (4, 45), (8, 100), (5, 35)]
)
def test_a_card_that_cannot_keep_up_settles_on_as_many_accounts_as_it_can(
    accounts: int, compute: float
) -> None:
    limits, late = simulated(accounts, compute, network=5, timeout=180)
    assert limits
    # It only ever falls, and far enough: none is let in that is paused again.
    assert limits == sorted(limits, reverse=True)
    # Three in a row are a kick.
    assert late < 2 * accounts


CARDS = Cards({BIG: 1}, {BIG: (Timestamp(0),), SMALL: (Timestamp(0),)})


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
