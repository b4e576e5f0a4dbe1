"""What came in and what gas went out over time: the journal's sums, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cluster.core.takings import DAY, HOUR, Sums, Takings
from cluster.core.types import Address, GpuClass, Timestamp
from cluster.status import View, WeiText

Step = Literal["hour", "day"]
SECONDS: Mapping[Step, int] = {"hour": HOUR, "day": DAY}
MOST_STEPS = 2_000
"""In one answer; who asks for more gets the newest."""


class EarningsStep(View):
    """`since` is the unix time at which the hour or day (UTC) begins."""

    since: float
    tasks: int
    paid: WeiText
    gas: WeiText


class ClassEarnings(View):
    """Of the accounts that stand for a class now; empty `name`: of none, such as the treasury."""

    name: str
    vram: int
    tasks: int
    paid: WeiText
    gas: WeiText


class Earnings(View):
    step: Step
    since: float
    tasks: int
    paid: WeiText
    gas: WeiText
    steps: tuple[EarningsStep, ...] = ()
    """Every step from `since` to now, those in which nothing happened among them."""
    classes: tuple[ClassEarnings, ...] = ()


def numbers(since: Timestamp, now: Timestamp, step: Step) -> tuple[int, int]:
    """Of the first and the last hour or day that is shown."""
    last = int(now // SECONDS[step])
    return max(int(since // SECONDS[step]), last - MOST_STEPS + 1), last


def earnings_of(
    takings: Takings,
    classes: Mapping[Address, GpuClass],
    first: int,
    last: int,
    step: Step,
) -> Earnings:
    """`takings` from the hour or day `first` to `last`, every one of them, and put into classes."""
    seconds = SECONDS[step]
    by_step = {number: takings.steps.get(number, Sums()) for number in range(first, last + 1)}
    by_class: dict[GpuClass | None, Sums] = {}
    for account, sums in takings.accounts.items():
        kind = classes.get(account)
        by_class[kind] = by_class.get(kind, Sums()) + sums
    total = sum(takings.steps.values(), Sums())
    return Earnings(
        step=step,
        since=float(first * seconds),
        **_view(total),
        steps=tuple(
            EarningsStep(since=float(number * seconds), **_view(sums))
            for number, sums in by_step.items()
        ),
        classes=tuple(
            ClassEarnings(
                name="" if kind is None else kind.name,
                vram=0 if kind is None else kind.vram,
                **_view(sums),
            )
            for kind, sums in sorted(by_class.items(), key=lambda item: -item[1].paid)
        ),
    )


def _view(sums: Sums) -> dict[str, Any]:
    return {"tasks": sums.tasks, "paid": _text(sums.paid), "gas": _text(sums.gas)}


def _text(wei: int) -> str:
    """What was taken back in an hour other than it came in may leave less than nothing there."""
    return str(max(wei, 0))
