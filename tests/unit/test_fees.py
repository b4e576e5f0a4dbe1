from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chain.fees import FeeSettings, Market, Offer, first, raised
from cluster.core.types import Wei

SETTINGS = FeeSettings(percent=120, tip=Wei(5), cap=Wei(10_000), step=25)
WEI = st.integers(0, 10**14).map(Wei)
MARKETS = st.builds(Market, st.none() | WEI, WEI)


def test_twice_the_base_fee_and_a_tip() -> None:
    offer = first(Market(Wei(100)), SETTINGS)
    assert offer == Offer(Wei(205), Wei(5))
    assert offer.fields() == {"maxFeePerGas": 205, "maxPriorityFeePerGas": 5, "type": 2}


def test_one_price_where_there_is_no_base_fee() -> None:
    offer = first(Market(None, Wei(100)), SETTINGS)
    assert offer == Offer(Wei(120))
    assert offer.fields() == {"gasPrice": 120}


def test_near_the_cap_an_offer_has_less_room_and_is_made_all_the_same() -> None:
    assert first(Market(Wei(6_000)), SETTINGS) == Offer(Wei(10_000), Wei(5))
    assert first(Market(Wei(9_995)), SETTINGS) == Offer(Wei(10_000), Wei(5))
    assert first(Market(Wei(9_996)), SETTINGS).fee > 10_000


def test_in_a_hurry_the_blocks_maker_gets_more() -> None:
    assert first(Market(Wei(100)), SETTINGS, 4) == Offer(Wei(220), Wei(20))
    assert first(Market(None, Wei(100)), SETTINGS, 2) == Offer(Wei(240))


def test_a_replacement_follows_the_market_or_the_step_whichever_is_more() -> None:
    old = Offer(Wei(205), Wei(5))
    assert raised(old, Market(Wei(100)), SETTINGS) == Offer(Wei(257), Wei(7))
    assert raised(old, Market(Wei(1000)), SETTINGS) == Offer(Wei(2005), Wei(7))
    assert raised(old, Market(Wei(9_999)), SETTINGS) is None
    assert raised(Offer(Wei(100)), Market(Wei(30)), SETTINGS) == Offer(Wei(125)), "stays as it is"


@given(MARKETS, MARKETS, st.integers(1, 8), st.integers(0, 100))
def test_every_replacement_is_one_that_nodes_take(
    before: Market, now: Market, urgency: int, step: int
) -> None:
    settings = FeeSettings(step=step, cap=Wei(10**16))
    old = first(before, settings)
    new = raised(old, now, settings, urgency)
    if new is None:
        return
    assert new.fee <= settings.cap
    assert new.fee * 10 >= old.fee * 11
    assert (new.tip is None) == (old.tip is None)
    if new.tip is not None and old.tip is not None:
        assert new.tip * 10 >= old.tip * 11
        assert new.tip <= new.fee


@pytest.mark.parametrize("market", [Market(Wei(100)), Market(None, Wei(100))])
def test_while_the_market_stands_what_is_paid_anyway_stays_in_bounds(market: Market) -> None:
    settings = FeeSettings(tip=Wei(100), percent=100)
    last = first(market, settings)
    while (offer := raised(last, market, settings)) is not None:
        last = offer
    assert 1500 <= (last.fee if last.tip is None else last.tip) <= 2000


def test_a_price_that_rose_is_followed() -> None:
    settings = FeeSettings(percent=100)
    assert raised(Offer(Wei(100)), Market(None, Wei(90_000)), settings) == Offer(Wei(90_000))
