"""Where an account may stand, and that it shows when somebody else moved it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import standing as module
from cluster.core.standing import (
    FIRST_REJOIN_SECONDS,
    KICKS_COUNT_FOR,
    LONGEST_REJOIN_SECONDS,
    STRANGE_SECONDS,
    Place,
    Standing,
    asked,
    cleared,
    counted,
    gave,
    judged,
    kicked,
    looked,
    missing,
    owed,
    place_of,
    robbed,
    slashed,
)
from cluster.core.types import AccountFacts, Address, NodeStatus, Timestamp, Wei

NOW = Timestamp(1_000_000.0)
SERVING = Standing(frozenset({Place.SERVING}))


def later(seconds: float) -> Timestamp:
    return Timestamp(NOW + seconds)


def strange(standing: Standing, status: NodeStatus) -> Standing:
    """Found so for as long as it takes."""
    found = looked(standing, status, NOW)
    assert not found.held
    return looked(found, status, later(STRANGE_SECONDS))


def test_every_status_has_a_place() -> None:
    assert {place_of(status) for status in NodeStatus} == set(Place)


@pytest.mark.parametrize("status", list(NodeStatus))
def test_an_account_is_taken_as_it_is_first_found(status: NodeStatus) -> None:
    found = looked(Standing(), status, NOW)
    assert found == Standing(frozenset({place_of(status)}))


def test_between_asking_and_seeing_both_places_are_right() -> None:
    pausing = asked(SERVING, Place.PAUSED)
    assert not strange(pausing, NodeStatus.BUSY).held
    seen = looked(pausing, NodeStatus.PENDING_PAUSE, NOW)
    assert seen.expected == {Place.PAUSED}
    assert strange(seen, NodeStatus.AVAILABLE).held


@pytest.mark.parametrize("status", [NodeStatus.PAUSED, NodeStatus.QUIT, NodeStatus.PENDING_QUIT])
def test_what_somebody_else_did_holds_the_account_after_a_while(status: NodeStatus) -> None:
    held = strange(SERVING, status)
    assert status.name.lower() in held.held
    assert "should be serving" in held.held
    # It stays so, whatever is found next, until the operator clears it.
    assert looked(held, status, later(1e6)).held == held.held
    assert looked(cleared(held), status, NOW).held == ""


def test_asking_makes_nothing_less_strange() -> None:
    found = looked(SERVING, NodeStatus.QUIT, NOW)
    assert asked(found, Place.PAUSED).strange_since == NOW
    assert looked(asked(found, Place.PAUSED), NodeStatus.QUIT, later(STRANGE_SECONDS)).held


def test_as_long_as_not_all_was_heard_nothing_is_held() -> None:
    found = looked(SERVING, NodeStatus.QUIT, NOW, sure=False)
    found = looked(found, NodeStatus.QUIT, later(2 * STRANGE_SECONDS), sure=False)
    assert (found.strange_since, found.held) == (NOW, "")
    assert looked(found, NodeStatus.QUIT, later(2 * STRANGE_SECONDS)).held


def test_money_is_missed_only_where_it_should_be() -> None:
    assert missing(SERVING, 0, 9) == 0, "never counted"
    rich = counted(SERVING, 420)
    assert missing(rich, 400, 9) == 20
    assert missing(rich, 500, 9) < 0
    assert missing(gave(rich, Wei(300)), 120, 9) == 0
    paid = owed(rich, Wei(100), 9)
    assert missing(paid, 420, 9) == 0, "it didn't come"
    assert missing(paid, 420, 10) == 100
    assert missing(owed(paid, Wei(50), 10), 420, 11) == 150
    assert missing(owed(paid, Wei(50), 9), 420, 10) == 50
    assert counted(paid, 519) == counted(SERVING, 519)
    assert missing(slashed(rich, 7), 0, 9) == 0
    held = robbed(rich, 420)
    assert "420 wei are gone" in held.held
    assert robbed(held, 1).held == held.held


def test_an_event_counts_once() -> None:
    once = kicked(SERVING, NOW, 7)
    assert kicked(once, later(9), 7) == once
    assert kicked(once, later(9), 6) == once
    assert len(kicked(once, later(9), 8).kicks) == 2
    # Also after the operator has cleared it, and where a moment isn't said, always.
    assert kicked(cleared(once), later(9), 7).kicks == ()
    assert len(kicked(kicked(SERVING, NOW), NOW).kicks) == 2


def test_what_passes_by_itself_holds_nothing() -> None:
    odd = looked(SERVING, NodeStatus.PAUSED, NOW)
    fine = looked(odd, NodeStatus.AVAILABLE, later(STRANGE_SECONDS - 1))
    assert fine == SERVING
    assert not looked(fine, NodeStatus.PAUSED, later(STRANGE_SECONDS + 1)).held


@pytest.mark.parametrize("happened", [lambda s: kicked(s, NOW), slashed])
def test_being_out_is_right_for_who_was_put_out(happened: object) -> None:
    assert callable(happened)
    assert not strange(happened(SERVING), NodeStatus.QUIT).held
    # Also when it is only heard of after it was seen.
    late = happened(looked(SERVING, NodeStatus.QUIT, NOW))
    assert not looked(late, NodeStatus.QUIT, later(STRANGE_SECONDS)).held


def test_each_kick_within_a_day_makes_the_wait_longer() -> None:
    assert Standing().rejoin_at == Timestamp(0)
    once = kicked(SERVING, NOW)
    assert once.rejoin_at == NOW + FIRST_REJOIN_SECONDS
    twice = kicked(once, later(1000))
    assert twice.rejoin_at == NOW + 1000 + 4 * FIRST_REJOIN_SECONDS
    many = twice
    for n in range(20):
        many = kicked(many, later(2000 + n))
    assert many.rejoin_at == NOW + 2019 + LONGEST_REJOIN_SECONDS
    assert len(many.kicks) <= 8
    days_later = kicked(many, later(3000 + KICKS_COUNT_FOR))
    assert days_later.rejoin_at == NOW + 3000 + KICKS_COUNT_FOR + FIRST_REJOIN_SECONDS
    assert cleared(many).rejoin_at == Timestamp(0)


ASKED = st.tuples(st.just("ask"), st.sampled_from(Place), st.booleans())
STORY = st.lists(
    ASKED | st.tuples(st.sampled_from(["kick", "kick unheard", "look"]), st.none(), st.none())
)
STATUS = {
    Place.OUT: NodeStatus.QUIT,
    Place.SERVING: NodeStatus.BUSY,
    Place.PAUSED: NodeStatus.PAUSED,
}


@given(STORY)
def test_what_we_and_the_network_do_holds_no_account(
    story: list[tuple[str, Place | None, bool | None]],
) -> None:
    found, place, owns, heard = looked(Standing(), NodeStatus.QUIT, NOW), Place.OUT, 420, True
    for number, (what, asked_for, done) in enumerate(story, 1):
        if asked_for is not None and heard:
            # Asked, and done or refused; either way the next look may come late.
            found = asked(found, asked_for)
            place = asked_for if done else place
        elif what.startswith("kick"):
            place, heard = Place.OUT, what == "kick"
            if heard:
                found = kicked(found, NOW, number)
        else:
            facts = AccountFacts(Address("0x1"), STATUS[place], None, Wei(0), Wei(owns), 0, None)
            found = judged(found, facts, later(number), heard, 0, 20)
            assert not found.held
            assert not (heard and found.is_doubtful)
            if not heard:
                found, heard = kicked(found, NOW, number), True


def test_the_text_form_keeps_everything() -> None:
    held = strange(kicked(SERVING, NOW), NodeStatus.PAUSED)
    rich = owed(counted(kicked(held, NOW, 7), 10**24), Wei(5), 9)
    for each in (Standing(), SERVING, held, rich):
        assert module.parsed(module.text(each)) == each


def test_what_an_older_version_wrote_is_read() -> None:
    old = '{"expected": ["serving"], "kicks": [5.0], "strange_since": null, "held": ""}'
    assert module.parsed(old) == Standing(SERVING.expected, (Timestamp(5.0),))
