"""What a node account is expected to be, so that it shows when somebody else used its key.

The network says where an account stands; what this operator asked for, and what the network did to
it (kicked out, slashed), says where it may stand. Between asking and seeing, both the old and the
new place are expected; once seen, only the seen one. What is in another place is *strange*: nothing
is done for it, least of all paid, until that is explained by an event that comes late. After longer
than one may take, it is held until the operator has looked at it.

         asked(SERVING)                       looked(SERVING)
    {OUT} ───────────▶ {OUT, SERVING} ─────────────────────────▶ {SERVING}
                                   looked(PAUSED) ──▶ strange ──for long──▶ held

The same holds for its money, stake and balance together: that falls by no more than gas, by what is
swept, and by a slash. Else somebody took it, and the account is held at once.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, replace
from typing import Final

from cluster.core.types import AccountFacts, NodeStatus, Timestamp, Wei

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
class Due:
    """A payment of ours to the account: it has come once the newest one is of a moment later than
    `after`."""

    amount: Wei
    after: int


@dataclass(frozen=True, slots=True)
class Standing:
    """`expected` is empty until the account was first looked at; then it is where it was found.

    `kicks`: when the network kicked the account out, the newest last. `held`: why nothing is done
    for it any more, in words; empty when all is well. `told`: moment of the newest event that was
    heard of it, each of which counts once. `worth`: what it owned, stake and balance, when it was
    last counted; None before.
    """

    expected: frozenset[Place] = frozenset()
    kicks: tuple[Timestamp, ...] = ()
    strange_since: Timestamp | None = None
    held: str = ""
    told: int = 0
    worth: Wei | None = None
    due: Due | None = None

    @property
    def is_doubtful(self) -> bool:
        """Where it was found isn't explained: nothing is done for it."""
        return self.strange_since is not None

    def expects(self, status: NodeStatus) -> bool:
        return not self.expected or place_of(status) in self.expected

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
    """We are about to ask the network to put it there. What is strange stays so."""
    return replace(standing, expected=standing.expected | {place})


def kicked(standing: Standing, at: Timestamp, moment: int = 0) -> Standing:
    """`moment` is the network's, 0 where it isn't known; the standing as it was when this is
    an event that has been counted."""
    if is_told(standing, moment):
        return standing
    kicks = (*standing.kicks, at)[-8:]
    told = max(standing.told, moment)
    return replace(standing, expected=standing.expected | {Place.OUT}, kicks=kicks, told=told)


def slashed(standing: Standing, moment: int = 0) -> Standing:
    """As `kicked`; its money is gone by it."""
    if is_told(standing, moment):
        return standing
    told = max(standing.told, moment)
    expected = standing.expected | {Place.OUT}
    return replace(standing, expected=expected, told=told, worth=None, due=None)


def is_told(standing: Standing, moment: int) -> bool:
    """Whether what happened at the moment has been counted."""
    return 0 < moment <= standing.told


def looked(standing: Standing, status: NodeStatus, now: Timestamp, sure: bool = True) -> Standing:
    """After a look that shows all that we have asked for so far. Unless it is `sure` that all
    is known that the network has done, nothing is held."""
    if standing.expects(status):
        return replace(standing, expected=frozenset({place_of(status)}), strange_since=None)
    standing = doubted(standing, now)
    since = standing.strange_since
    if standing.held or not sure or since is None or now - since < STRANGE_SECONDS:
        return standing
    wanted = " or ".join(sorted(each.value for each in standing.expected))
    held = f"it is {status.name.lower()} and should be {wanted}: did somebody else use its key?"
    return replace(standing, held=held)


def doubted(standing: Standing, now: Timestamp) -> Standing:
    return standing if standing.is_doubtful else replace(standing, strange_since=now)


def is_unclear(standing: Standing, now: Timestamp) -> bool:
    """It is strange for longer than takes to hold it, and it can't be said why."""
    since = standing.strange_since
    return since is not None and not standing.held and now - since > STRANGE_SECONDS


def cleared(standing: Standing) -> Standing:
    """The operator has looked at it: it is taken as it is found next, and kicks are forgotten."""
    return Standing(told=standing.told)


# --- its money ------------------------------------------------------------------------------------


def owed(standing: Standing, amount: Wei, paid: int) -> Standing:
    """We are about to pay it so much; `paid` is the moment of the newest payment before."""
    return replace(standing, worth=_worth(standing, paid), due=Due(amount, paid))


def gave(standing: Standing, amount: Wei) -> Standing:
    """We are about to have it pay so much."""
    worth = standing.worth
    return standing if worth is None else replace(standing, worth=Wei(max(0, worth - amount)))


def missing(standing: Standing, owns: int, paid: int) -> int:
    """How much less it owns than it should, in wei; gas aside. `paid` is the moment of the newest
    payment to it, and the look is later."""
    worth = _worth(standing, paid)
    return 0 if worth is None else worth - owns


def counted(standing: Standing, owns: int) -> Standing:
    """It was seen to own so much, as it should."""
    return replace(standing, worth=Wei(owns), due=None)


def judged(
    standing: Standing,
    found: AccountFacts,
    now: Timestamp,
    sure: bool,
    paid: int,
    gas: int,
    settled: bool = True,
) -> Standing:
    """`looked`, and its money counted: where more than `gas` is missing, it is held at once; that
    is so also before the look shows all that we have asked for, and is `settled`."""
    after, owns = standing, found.stake + found.balance
    if settled:
        after = looked(standing, found.status, now, sure)
    gone = missing(after, owns, paid)
    if gone > gas:
        return robbed(after, gone) if sure else doubted(after, now)
    known = after.due is None and after.worth is not None and abs(owns - after.worth) <= gas // 4
    return counted(after, owns) if settled and not known else after


def is_puzzling(
    standing: Standing, found: AccountFacts, paid: int, gas: int, settled: bool = True
) -> bool:
    """Whether something must have happened to the account that isn't known."""
    if standing.held:
        return False
    gone = missing(standing, found.stake + found.balance, paid)
    return gone > gas or (settled and not standing.expects(found.status))


def robbed(standing: Standing, amount: int) -> Standing:
    if standing.held:
        return standing
    held = f"{amount} wei are gone from it: did somebody else use its key, or was it slashed?"
    return replace(standing, held=held)


def _worth(standing: Standing, paid: int) -> Wei | None:
    worth, due = standing.worth, standing.due
    if worth is None or due is None or paid <= due.after:
        return worth
    return Wei(worth + due.amount)


# --- as text, for the journal ---------------------------------------------------------------------


def text(standing: Standing) -> str:
    return json.dumps(
        {
            "expected": sorted(place.value for place in standing.expected),
            "kicks": list(standing.kicks),
            "strange_since": standing.strange_since,
            "held": standing.held,
            "told": standing.told,
            "worth": standing.worth,
            "due": None if standing.due is None else [standing.due.amount, standing.due.after],
        }
    )


def parsed(words: str) -> Standing:
    """What `text` wrote."""
    said = json.loads(words)
    since, worth, due = said["strange_since"], said.get("worth"), said.get("due")
    return Standing(
        frozenset(map(Place, said["expected"])),
        tuple(map(Timestamp, said["kicks"])),
        None if since is None else Timestamp(since),
        said["held"],
        said.get("told", 0),
        None if worth is None else Wei(worth),
        None if due is None else Due(Wei(due[0]), due[1]),
    )
