"""The time by which the chain judges deadlines."""

from __future__ import annotations

from cluster.chain.rpc import Block
from cluster.core.types import Timestamp


class ChainClock:
    """The chain's time: what the next block will most likely say, by which it judges deadlines.

    A block's own timestamp is too old for that on a chain that makes blocks only when there is
    something to put in them. So the wall clock carries it on, corrected by how far the two are
    apart; that shows only where a block was made between two looks, and then only as a range:

        look (wall w0) ──── block (chain t) ──── look (wall w1)    wall − chain in [w0 − t, w1 − t]

    Until a block is seen to be made, the wall clock is believed. Being early costs a simulation
    that reverts, being late a few seconds.
    """

    def __init__(self) -> None:
        self._last: tuple[int, Timestamp] | None = None
        self._ahead = 0.0

    def observe(self, block: Block, wall: Timestamp) -> Timestamp:
        """The network's `now` at a look at `wall` that found `block`."""
        if self._last is not None and block.number > self._last[0]:
            least, most = self._last[1] - block.timestamp, wall - block.timestamp
            self._ahead = min(max(self._ahead, least), most)
        if self._last is None or block.number >= self._last[0]:
            self._last = (block.number, wall)
        return Timestamp(max(block.timestamp, wall - self._ahead))

    def now(self, wall: Timestamp) -> Timestamp:
        """The network's time at `wall`, by what was observed last."""
        newest = 0.0 if self._last is None else self._last[1]
        return Timestamp(max(newest, wall - self._ahead))
