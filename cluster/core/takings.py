"""What came in and what gas went out, added up by the hour and by the day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cluster.core.types import Address, Wei

HOUR: Final = 3600
DAY: Final = 24 * HOUR
_NOTHING: Final = Wei(0)


@dataclass(frozen=True, slots=True)
class Sums:
    tasks: int = 0
    paid: Wei = _NOTHING
    gas: Wei = _NOTHING

    def __add__(self, more: Sums) -> Sums:
        return Sums(self.tasks + more.tasks, Wei(self.paid + more.paid), Wei(self.gas + more.gas))


@dataclass(frozen=True, slots=True)
class Takings:
    """The same twice: by the number of the hour or day (of unix time), and by account; those in
    which nothing happened are left out."""

    steps: Mapping[int, Sums]
    accounts: Mapping[Address, Sums]
