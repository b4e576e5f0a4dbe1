"""What drains mean for the accounts: whose cards count no more, and who is still in a drain's way.

A plan that was made before an order isn't acted on after it, and an order isn't carried out before
the fleet has had a whole turn since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from actors.drain import Drains
from cluster.core import draining
from cluster.core.capacity import NO_LIMIT, Cards, Target
from cluster.core.fleet_actions import FleetAction, Fund, Join, Resume
from cluster.core.node_accounts import NodeAccount, belongs
from cluster.core.types import Gpu, GpuClass, NodeStatus
from cluster.core.wording import counted

_RESTING = frozenset({NodeStatus.QUIT, NodeStatus.PAUSED})
_GOING = frozenset({NodeStatus.PENDING_PAUSE, NodeStatus.PENDING_QUIT})
"""They take no new task, and finish what they have."""
_TURN = "the accounts were not looked at since"


class Draining:
    def __init__(self, drains: Drains) -> None:
        self._drains = drains
        self._taken: list[GpuClass] = []
        self._leaving: Counter[GpuClass] = Counter()
        self._serving: dict[GpuClass, int] = {}
        """How many of a class may go on serving since cards of it were drained."""
        self._allowed: dict[GpuClass, int] = {}
        self._carried_out: int | None = None

    # --- for the plan ----------------------------------------------------------------------------

    def take_out(self, gpus: Iterable[Gpu]) -> None:
        """The operator has just drained these cards, one by one or with their machine."""
        self._taken += [gpu.gpu_class for gpu in gpus]

    def put_back(self, gpus: Iterable[Gpu]) -> None:
        """The drain of these cards has ended, though not every drain has."""
        for gpu in gpus:
            self._serving.pop(gpu.gpu_class, None)

    def before_count(self, cards: Cards, gpus: Sequence[Gpu]) -> Cards:
        """What is left of the last count of cards."""
        self._drains.learn(gpus)
        if not self._drains.any:
            self._serving.clear()
        self._leaving = Counter(self._taken)
        self._taken.clear()
        return cards.without(self._leaving)

    def target(
        self, gpu_class: GpuClass, found: Target, serving: int, kept: int, slots: int | None
    ) -> Target:
        """`found` within what the drained cards leave. `slots` is None where it isn't known how
        many accounts a card is to have."""
        if drained := self._leaving[gpu_class]:
            before = self._serving.get(gpu_class)
            left = draining.still_serving(before, serving, drained, kept, slots)
            self._serving[gpu_class] = left
        most = found.most
        if most == NO_LIMIT or slots is None:
            # Else the cards that are left say it better.
            most = max(found.least, min(most, self._serving.get(gpu_class, NO_LIMIT)))
        self._allowed[gpu_class] = most if most != NO_LIMIT else kept * (slots or 1)
        return replace(found, most=most)

    # --- orders and turns ------------------------------------------------------------------------

    def begin_turn(self) -> int:
        return self._drains.revision

    def ended_turn(self, begun: int) -> None:
        """A whole turn has been made with what was drained as it began."""
        self._carried_out = begun

    def outdates(self, action: FleetAction, begun: int) -> bool:
        """Whether an order came after the turn began that this action may be against."""
        return isinstance(action, Join | Resume | Fund) and begun != self._drains.revision

    # --- what is left to do ----------------------------------------------------------------------

    def left(
        self, accounts: Sequence[NodeAccount], classes: Iterable[GpuClass] | None
    ) -> list[str]:
        """In words, what the accounts still have to do until drained cards of these classes are
        done with, or (None) until all is."""
        waits = [] if self._carried_out == self._drains.revision else [_TURN]
        if classes is None:
            return [*waits, *_not_resting(accounts)]
        return [*waits, *self._too_many(accounts, classes)]

    def _too_many(
        self, accounts: Sequence[NodeAccount], classes: Iterable[GpuClass]
    ) -> Iterable[str]:
        for gpu_class in sorted(classes, key=lambda each: (-each.vram, each.name)):
            serving = [each for each in accounts if belongs(each) == gpu_class and _serves(each)]
            beyond = len(serving) - self._allowed.get(gpu_class, 0)
            if beyond > 0:
                serve = "serves" if beyond == 1 else "serve"
                who = counted(beyond, "account")
                yield f"{who} of {gpu_class.name} {serve} more than its other cards can"
                yield from _left_alone(serving)


def _not_resting(accounts: Sequence[NodeAccount]) -> Iterable[str]:
    waited_for = [each for each in accounts if not at_rest(each)]
    held = [each for each in waited_for if each.held]
    if len(waited_for) > len(held):
        count = len(waited_for) - len(held)
        yield f"{counted(count, 'account')} {'is' if count == 1 else 'are'} not paused yet"
    yield from _left_alone(held)


def _left_alone(accounts: Iterable[NodeAccount]) -> Iterable[str]:
    """Nothing of ours will ever pause these."""
    for account in accounts:
        if account.held:
            yield (
                f"account {account.address} is held and serves: see why, then crynux-cluster "
                f"fleet clear {account.address}"
            )


def at_rest(account: NodeAccount) -> bool:
    """It takes no task, and nothing of ours that is on its way changes that."""
    facts = account.facts
    return facts is not None and not account.moving and facts.status in _RESTING


def _serves(account: NodeAccount) -> bool:
    facts = account.facts
    return not at_rest(account) and (facts is None or facts.status not in _GOING)
