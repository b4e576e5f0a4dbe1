"""What came in and what gas went out over time: the journal's hourly sums, put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from cluster.core.types import Address, GpuClass, Timestamp
from cluster.journal_takings import HOUR, Takings
from cluster.status import View, WeiText

Step = Literal["hour", "day"]
SECONDS: Mapping[Step, int] = {"hour": HOUR, "day": 24 * HOUR}
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


def earnings_of(
    takings: Iterable[Takings],
    classes: Mapping[Address, GpuClass],
    since: Timestamp,
    now: Timestamp,
    step: Step,
) -> Earnings:
    """`takings` from the hour of `since` on, put into steps and classes."""
    seconds = SECONDS[step]
    last = int(now // seconds)
    first = max(int(since // seconds), last - MOST_STEPS + 1)
    by_step = {number: (0, 0, 0) for number in range(first, last + 1)}
    by_class: dict[GpuClass | None, tuple[int, int, int]] = {}
    for each in takings:
        number = int(each.since // seconds)
        if number not in by_step:
            continue
        by_step[number] = _add(by_step[number], each)
        kind = classes.get(each.account)
        by_class[kind] = _add(by_class.get(kind, (0, 0, 0)), each)
    tasks, paid, gas = (sum(column) for column in zip(*by_step.values(), strict=True))
    return Earnings(
        step=step,
        since=float(first * seconds),
        tasks=tasks,
        paid=_text(paid),
        gas=_text(gas),
        steps=tuple(
            EarningsStep(
                since=float(number * seconds),
                tasks=sums[0],
                paid=_text(sums[1]),
                gas=_text(sums[2]),
            )
            for number, sums in by_step.items()
        ),
        classes=tuple(
            ClassEarnings(
                name="" if kind is None else kind.name,
                vram=0 if kind is None else kind.vram,
                tasks=sums[0],
                paid=_text(sums[1]),
                gas=_text(sums[2]),
            )
            for kind, sums in sorted(by_class.items(), key=lambda item: -item[1][1])
        ),
    )


def _add(sums: tuple[int, int, int], each: Takings) -> tuple[int, int, int]:
    return sums[0] + each.tasks, sums[1] + each.paid, sums[2] + each.gas


def _text(wei: int) -> str:
    """What was taken back in an hour other than it came in may leave less than nothing there."""
    return str(max(wei, 0))
