"""What the benchmarks are made of, in little: they are run by hand, and a change elsewhere that
breaks them would not be seen until then."""

from __future__ import annotations

import pytest

from benchmarks import utilisation
from benchmarks.chain_world import Cards, chain_room, specs
from devnet.models import SD15

pytestmark = pytest.mark.timeout(600)


async def test_a_coordinator_with_stand_in_cards_has_its_tasks_paid() -> None:
    async with chain_room(2, 0.5) as room:
        await room.until_joined()
        await room.send(specs(3, SD15[0]))
        assert len(room.cards.busy) == 3
        assert room.calls["eth_getLogs"] > 0
        assert len(room.fetches) >= 3, "each is asked for until the relay has it"


def test_how_busy_cards_were_is_counted_within_the_window() -> None:
    cards = Cards(utilisation.CARDS)
    # Before it, into it, within it, beyond it and after it.
    cards.busy += [(0.0, 9.0), (9.0, 11.0), (12.0, 16.0), (19.0, 30.0), (20.0, 24.0)]
    assert utilisation.share(cards, 10.0, 20.0) == (1.0 + 4.0 + 1.0) / (utilisation.CARDS * 10.0)
