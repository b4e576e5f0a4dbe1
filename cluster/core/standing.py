"""What a node account is expected to be, so that it shows when somebody else used its key.

The network says where an account stands; what this operator asked for, and what the network did to
it (kicked out, slashed), says where it may stand. Between asking and seeing, both the old and the
new place are expected; once seen, only the seen one. What is in another place for longer than an
event may take to be heard of is *strange*: nothing more is done for that account until the operator
has looked at it.

         asked(SERVING)                       looked(SERVING)
    {OUT} ───────────▶ {OUT, SERVING} ─────────────────────────▶ {SERVING}
                                             looked(PAUSED) for long ──▶ held
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, replace
from typing import Final

from cluster.core.types import NodeStatus, Timestamp

STRANGE_SECONDS: Final = 180.0
"""How long an account may stand where nobody put it: events come late, endpoints lag."""
FIRST_REJOIN_SECONDS: Final = 60.0
LONGEST_REJOIN_SECONDS: Final = 6 * 3600.0
KICKS_COUNT_FOR: Final = 24 * 3600.0
"""Kicks that are older don't lengthen the wait any more."""


class Place(enum.Enum):
    OUT = "out"
    SERVING = "serving"
    PAUSED = "paused"


_PLACES: Final = {
    NodeStatus.QUIT: Place.OUT,
    NodeStatus.PENDING_QUIT: Place.OUT,
    NodeStatus.AVAILABLE: Place.SERVING,
    NodeStatus.BUSY: Place.SERVING,
    NodeStatus.PENDING_PAUSE: Place.PAUSED,
    NodeStatus.PAUSED: Place.PAUSED,
}


def place_of(status: NodeStatus) -> Place:
    """Where a status is on the way to: what is pending will come by itself."""
    return _PLACES[status]


@dataclass(frozen=True, slots=True)
class Standing:
    """`expected` is empty until the account was first looked at; then it is where it was found.

    `kicks`: when the network kicked the account out, the newest last. `held`: why nothing is done
    for it any more, in words; empty when all is well.
    """

    expected: frozenset[Place] = frozenset()
    kicks: tuple[Timestamp, ...] = ()
    strange_since: Timestamp | None = None
    held: str = ""

    @property
    def rejoin_at(self) -> Timestamp:
        """Before then a kicked account isn't joined again: its results were too slow or too few,
        and the next stake would go the same way."""
        if not self.kicks:
            return Timestamp(0)
        last = self.kicks[-1]
        recent = sum(1 for at in self.kicks if last - at < KICKS_COUNT_FOR)
        wait = FIRST_REJOIN_SECONDS * 4.0 ** min(recent - 1, 10)
        return Timestamp(last + min(wait, LONGEST_REJOIN_SECONDS))


def asked(standing: Standing, place: Place) -> Standing:
    """We are about to ask the network to put it there."""
    return replace(standing, expected=standing.expected | {place}, strange_since=None)


def kicked(standing: Standing, at: Timestamp) -> Standing:
    kicks = (*standing.kicks, at)[-8:]
    return replace(standing, expected=standing.expected | {Place.OUT}, kicks=kicks)


def slashed(standing: Standing) -> Standing:
    return replace(standing, expected=standing.expected | {Place.OUT})


def looked(standing: Standing, status: NodeStatus, now: Timestamp) -> Standing:
    """After a look that shows all that we have asked for so far."""
    place = place_of(status)
    if not standing.expected or place in standing.expected:
        return replace(standing, expected=frozenset({place}), strange_since=None)
    if standing.strange_since is None:
        return replace(standing, strange_since=now)
    if standing.held or now - standing.strange_since < STRANGE_SECONDS:
        return standing
    wanted = " or ".join(sorted(each.value for each in standing.expected))
    held = f"it is {status.name.lower()} and should be {wanted}: did somebody else use its key?"
    return replace(standing, held=held)


def cleared(standing: Standing) -> Standing:
    """The operator has looked at it: it is taken as it is found next, and kicks are forgotten."""
    return Standing()


# --- as text, for the journal ---------------------------------------------------------------------


def text(standing: Standing) -> str:
    return json.dumps(
        {
            "expected": sorted(place.value for place in standing.expected),
            "kicks": list(standing.kicks),
            "strange_since": standing.strange_since,
            "held": standing.held,
        }
    )


def parsed(words: str) -> Standing:
    """What `text` wrote."""
    said = json.loads(words)
    since = said["strange_since"]
    return Standing(
        frozenset(map(Place, said["expected"])),
        tuple(map(Timestamp, said["kicks"])),
        None if since is None else Timestamp(since),
        said["held"],
    )
