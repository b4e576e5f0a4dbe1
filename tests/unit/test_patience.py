from __future__ import annotations

from actors.patience import HELD_SECONDS, LONGEST_SECONDS, Patience


def test_terms_that_break_at_once_come_less_and_less_often() -> None:
    patience = Patience(0.5)
    waits = [patience.after(broke=True, lasted=0.1) for _ in range(9)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_SECONDS, *[LONGEST_SECONDS] * 2]


def test_after_a_term_that_held_or_didnt_break_it_is_begun_again_soon() -> None:
    for broke, lasted in ((True, HELD_SECONDS), (False, 0.0)):
        patience = Patience(0.5)
        for _ in range(4):
            patience.after(broke=True, lasted=HELD_SECONDS - 1)
        assert patience.after(broke, lasted) == 0.5


def test_a_lost_lease_alone_is_waited_for_no_longer_each_time() -> None:
    patience = Patience(0.5)
    assert [patience.after(broke=False, lasted=1.0) for _ in range(3)] == [0.5] * 3
