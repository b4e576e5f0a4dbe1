"""What leaves a full tier: the parts that are worth the least for the room they take.

A part is worth the seconds that it would cost to bring back, times how likely it is needed again.
Likelihood is a count of the tasks that needed it, each counting half as much after `HALF_LIFE`
further tasks: so a model that many tasks ask for outlives one that was used just now, and an old
favourite fades. Popularity is remembered for what has left, too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

HALF_LIFE: Final = 40.0
"""In tasks."""
MOST_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True)
class Resident(Generic[Key]):
    """A part in a tier: bytes, seconds to bring it back, how likely it is needed; `kept` stays."""

    key: Key
    size: int
    seconds: float
    need: float
    kept: bool = False

    @property
    def worth(self) -> float:
        """Expected seconds saved for each byte."""
        return self.need * self.seconds / max(self.size, 1)


def victims(residents: Sequence[Resident[Key]], wanted: int, budget: int) -> tuple[Key, ...]:
    """Whom to send away so that `wanted` more bytes fit into `budget`; least worthy first.

    Everything that may leave, when even that isn't enough. A part is spared again when the others
    that leave make room enough without it.
    """
    excess = sum(resident.size for resident in residents) + wanted - budget
    leaving: list[Resident[Key]] = []
    for resident in sorted(residents, key=lambda each: each.worth):
        if excess <= 0:
            break
        if not resident.kept:
            leaving.append(resident)
            excess -= resident.size
    for resident in sorted(leaving, key=lambda each: -each.worth):
        if excess + resident.size <= 0:
            leaving.remove(resident)
            excess += resident.size
    return tuple(resident.key for resident in leaving)


class Popularity(Generic[Key]):
    """Decayed counts of need, by key."""

    def __init__(self) -> None:
        self._tasks = 0
        self._counts: dict[Key, tuple[float, int]] = {}

    def note(self, keys: Iterable[Key]) -> None:
        """One more task, which needs these."""
        self._tasks += 1
        for key in set(keys):
            self._counts[key] = (self.of(key) + 1.0, self._tasks)
        if len(self._counts) > MOST_REMEMBERED:
            for key in sorted(self._counts, key=self.of)[: MOST_REMEMBERED // 8]:
                del self._counts[key]

    def of(self, key: Key) -> float:
        count, at = self._counts.get(key, (0.0, self._tasks))
        return float(count * 0.5 ** ((self._tasks - at) / HALF_LIFE))

    def snapshot(self) -> Mapping[Key, float]:
        return {key: self.of(key) for key in self._counts}
