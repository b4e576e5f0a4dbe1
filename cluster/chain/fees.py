"""What a transaction offers for each gas: pure. In wei per gas.

On a chain with a base fee (EIP-1559) an offer is a ceiling and a tip: twice the base fee and the
tip lets a transaction through while the base fee doubles, and costs no more than it has to.
Elsewhere it is one price. A replacement has to offer more of everything than what it replaces, or
no node takes it (by a tenth, with most of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.core.types import Wei

LEAST_STEP: Final = 13
"""Percent more that any replacement offers: above the tenth that nodes ask for."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`fee` is the most that is paid in all; `tip` goes to the block's maker, None without a base
    fee."""

    fee: Wei
    tip: Wei | None = None

    def fields(self) -> dict[str, int]:
        """The fields of a transaction."""
        if self.tip is None:
            return {"gasPrice": self.fee}
        return {"maxFeePerGas": self.fee, "maxPriorityFeePerGas": self.tip, "type": 2}


@dataclass(frozen=True, slots=True)
class Market:
    """What the chain asks now: a base fee, or else a price; and its newest block's number."""

    base_fee: Wei | None
    price: Wei = Wei(0)
    block: int = 0


@dataclass(frozen=True, slots=True)
class FeeSettings:
    """`percent` of a price without a base fee. `cap`: nothing is ever offered above it. `step`:
    percent more for each replacement. What is paid in any case, the tip or a price, never becomes
    more than so many times (`most`) what a new transaction would offer that is in no hurry."""

    percent: int = 120
    tip: Wei = Wei(10**9)
    cap: Wei = Wei(10**12)
    step: int = 25
    most: int = 20


def first(market: Market, settings: FeeSettings, urgency: int = 1) -> Offer:
    """An offer for a new transaction; `urgency` multiplies what goes to the block's maker, or
    without a base fee the whole."""
    if market.base_fee is None:
        return Offer(Wei(market.price * settings.percent * urgency // 100))
    tip = Wei(settings.tip * urgency)
    fee = 2 * market.base_fee + tip
    if fee > settings.cap >= market.base_fee + tip:
        fee = settings.cap  # less room for the base fee to rise, but it is mined as things are
    return Offer(Wei(fee), tip)


def too_low(offer: Offer, market: Market) -> bool:
    """Whether the market has left it behind: it isn't mined as things are."""
    asked = market.price if market.base_fee is None else market.base_fee + (offer.tip or 0)
    return offer.fee < asked


def raised(old: Offer, market: Market, settings: FeeSettings, urgency: int = 1) -> Offer | None:
    """An offer in the place of `old`; None when it would have to be above what is ever offered.

    A transaction keeps its kind: one without a tip stays without.
    """
    fresh = first(market, settings, urgency)
    step = 100 + max(settings.step, LEAST_STEP)
    fee = max(_more(old.fee, step), fresh.fee)
    usual = first(market, settings)
    if old.tip is None:
        most = max(usual.fee * settings.most, fresh.fee)
        return None if fee > min(settings.cap, most) else Offer(Wei(fee))
    tip = max(_more(old.tip, step), fresh.tip or 0)
    fee = max(fee, tip)
    most = max(settings.tip * settings.most, fresh.tip or 0)
    return None if fee > settings.cap or tip > most else Offer(Wei(fee), Wei(tip))


def _more(value: int, percent: int) -> int:
    return -(-value * percent // 100)
