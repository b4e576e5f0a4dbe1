"""An account whose key somebody else has too, who empties it again and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster import journal_gas, journal_takings
from cluster.chain import outbox_rows
from cluster.chain.outbox_rows import RowState
from cluster.core.types import Address, NodeStatus, Timestamp, Wei
from tests.unit.actor_fakes import ALICE, BOB
from tests.unit.test_fleet_keeper import TREASURY, World

DAY = 86_400.0


def add_gas(world: World, number: int, amount: int) -> None:
    """As the outbox writes a payment down."""
    key = f"account:{TREASURY}:gas:{ALICE}:{number}"
    intent = outbox_rows.Intent(key, TREASURY, ALICE, b"", Wei(amount))
    with world.journal.write(world.ledger.lease) as connection:
        outbox_rows.add(connection, intent, Timestamp(world.clock()))


def test_who_takes_an_accounts_gas_again_and_again_gets_a_bounded_part_of_it(
    tmp_path: Path,
) -> None:
    """He has its key; each time it is less than what is called a robbery."""
    world, sent = World(tmp_path), 0
    for number in range(10):
        world.see(ALICE, NodeStatus.AVAILABLE, balance=1)
        for call in world.turn():
            assert call == ("transfer", TREASURY, ALICE, 19, "gas")
            add_gas(world, number, 19)
            sent += 19
        world.later(60)
    assert sent == 3 * 19
    (line,) = world.keeper.view.lacks
    assert "account 1 was sent 57 wei more for gas in a day than it spent" in line
    assert line in world.keeper.alerts()
    # What its own transactions cost is no theft.
    with world.journal.write(world.ledger.lease) as connection:
        journal_takings.add(connection, Timestamp(world.clock()), ALICE, gas=Wei(40))
    assert world.turn() == [("transfer", TREASURY, ALICE, 19, "gas")]
    world.later(25 * 3600.0)
    world.see(ALICE, NodeStatus.AVAILABLE, balance=1)
    assert world.turn() == [("transfer", TREASURY, ALICE, 19, "gas")]


def test_what_is_gone_is_of_the_last_day_and_of_one_account(tmp_path: Path) -> None:
    world = World(tmp_path)

    def gone(account: Address = ALICE) -> int:
        with world.journal.read() as connection:
            now = Timestamp(world.clock())
            return journal_gas.gone(connection, TREASURY, account, now)

    assert gone() == 0
    add_gas(world, 0, 30)
    world.later(DAY / 2)
    add_gas(world, 1, 20)
    assert (gone(), gone(BOB)) == (50, 0)
    with world.journal.write(world.ledger.lease) as connection:
        journal_takings.add(connection, Timestamp(world.clock()), ALICE, gas=Wei(5))
        journal_takings.add(connection, Timestamp(world.clock()), BOB, gas=Wei(500))
        # One that was refused never came to be.
        row = outbox_rows.by_key(connection, f"account:{TREASURY}:gas:{ALICE}:1")
        assert row is not None
        outbox_rows.store(connection, replace(row, state=RowState.REFUSED))
    assert gone() == 25
    world.later(DAY / 2 + 1)
    assert gone() == 0
