"""Where an account may stand, and that it shows when somebody else moved it."""

from __future__ import annotations

import pytest

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
    kicked,
    looked,
    place_of,
    slashed,
)
from cluster.core.types import NodeStatus, Timestamp

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


def test_the_text_form_keeps_everything() -> None:
    held = strange(kicked(SERVING, NOW), NodeStatus.PAUSED)
    for each in (Standing(), SERVING, held, kicked(held, NOW)):
        assert module.parsed(module.text(each)) == each
