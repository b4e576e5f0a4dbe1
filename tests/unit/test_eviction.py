"""Who leaves a full tier: pure, on invented residents."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.eviction import HALF_LIFE, MOST_REMEMBERED, Popularity, Resident, victims


def resident(key: str, size: int = 10, seconds: float = 1.0, need: float = 1.0) -> Resident[str]:
    return Resident(key, size, seconds, need)


def test_nobody_leaves_while_there_is_room() -> None:
    assert victims([resident("a"), resident("b")], wanted=10, budget=30) == ()


@pytest.mark.parametrize(
    ("worthy", "worthless"),
    [
        (resident("worthy", need=2.0), resident("worthless", need=1.0)),
        (resident("worthy", seconds=2.0), resident("worthless", seconds=1.0)),
        (resident("worthy", size=5), resident("worthless", size=10)),
        (resident("worthy", need=1.0, seconds=5.0), resident("worthless", need=2.0, seconds=1.0)),
    ],
    ids=["needed more", "dearer to bring back", "smaller", "the product counts"],
)
def test_the_least_worthy_leaves(worthy: Resident[str], worthless: Resident[str]) -> None:
    room = worthy.size + worthless.size
    for order in ([worthy, worthless], [worthless, worthy]):
        assert victims(order, wanted=1, budget=room) == ("worthless",)


def test_what_is_kept_never_leaves() -> None:
    kept = Resident("kept", 10, 0.0, 0.0, kept=True)
    assert victims([kept, resident("other")], wanted=10, budget=20) == ("other",)
    assert victims([kept], wanted=10, budget=10) == ()


def test_the_small_is_spared_when_a_large_one_must_leave_anyway() -> None:
    small, large = resident("small", size=2, need=0.1), resident("large", size=100, need=6.0)
    assert small.worth < large.worth
    assert victims([small, large], wanted=90, budget=110) == ("large",)


RESIDENTS = st.lists(
    st.builds(
        Resident,
        key=st.uuids().map(str),
        size=st.integers(0, 1000),
        seconds=st.floats(0, 100),
        need=st.floats(0, 100),
        kept=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda each: each.key,
)


@given(RESIDENTS, st.integers(0, 3000), st.integers(0, 5000))
def test_there_is_room_afterwards_or_nobody_left_to_send_away(
    residents: list[Resident[str]], wanted: int, budget: int
) -> None:
    leaving = set(victims(residents, wanted, budget))
    stay = [each for each in residents if each.key not in leaving]
    assert not any(each.kept for each in residents if each.key in leaving)
    fits = sum(each.size for each in stay) + wanted <= budget
    assert fits or all(each.kept for each in stay)
    for each in residents:
        # Nobody leaves for nothing.
        if each.key in leaving and each.size:
            assert sum(s.size for s in stay) + each.size + wanted > budget


def test_popularity_halves_and_adds() -> None:
    popularity: Popularity[str] = Popularity()
    popularity.note(["a", "a", "b"])
    assert popularity.of("a") == popularity.of("b") == 1.0
    assert popularity.of("never") == 0.0
    for _ in range(int(HALF_LIFE)):
        popularity.note(["b"])
    assert popularity.of("a") == pytest.approx(0.5)
    assert popularity.of("b") > 20


def test_a_favourite_outlives_the_newest() -> None:
    popularity: Popularity[str] = Popularity()
    for _ in range(5):
        popularity.note(["favourite"])
    popularity.note(["newest"])
    assert popularity.of("favourite") > popularity.of("newest")


def test_memory_of_what_was_needed_is_bounded() -> None:
    popularity: Popularity[int] = Popularity()
    for key in range(MOST_REMEMBERED + 100):
        popularity.note([key])
    assert len(popularity.snapshot()) <= MOST_REMEMBERED
    assert popularity.of(MOST_REMEMBERED + 99) == 1.0
