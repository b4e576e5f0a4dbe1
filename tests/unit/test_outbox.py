from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from eth_utils.crypto import keccak
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chain.outbox import Outbox
from cluster.chain.outbox_ports import OutboxSettings
from cluster.chain.outbox_rows import Intent, OutboxRow, RowState, Signed, by_key, task_intent
from cluster.chain.rpc import Rpc
from cluster.core.errors import ChainError, IllegalMove, LeaseLost, NetworkUnavailable
from cluster.core.lifecycle import WriteState
from cluster.core.ports import Lease, Movement
from cluster.core.record import Claim
from cluster.core.takings import HOUR
from cluster.core.types import Address, Commitment, Timestamp, Wei
from cluster.journal import SqlJournal
from tests.unit.journal_plans import plans, scanned

ALICE, BOB = Address("0x" + "aa" * 20), Address("0x" + "bb" * 20)
CONTRACT = Address("0x" + "cc" * 20)
TASK = Commitment("0x" + "01" * 32)


@dataclass
class FakeChain:
    """Takes JSON for signed bytes, mines in order of nonces, and lets each answer (data) once."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    pool: dict[str, dict[str, Any]] = field(default_factory=dict)
    mined: dict[str, bool] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    refusing: dict[str, str] = field(default_factory=dict)
    senders: dict[str, tuple[str, str]] = field(default_factory=dict)
    reverting: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    refuse_sends: bool = False
    gas: int = 80_000
    balance: int = 10**18
    base_fee: int | None = None
    head: int = 1
    blocks: dict[str, int] = field(default_factory=dict)
    """Where each was mined; block 1 where it isn't said."""
    others: list[tuple[str, int, int]] = field(default_factory=list)
    """Account, nonce and block of what others sent with an account's key."""
    rule: Callable[[dict[str, Any]], str] = lambda _tx: ""
    """Why a transaction isn't taken, in words."""

    async def __call__(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        fault = self.faults.pop() if self.faults and method == "eth_sendRawTransaction" else ""
        if fault == "drop":
            raise ChainError("dropped")
        answer = self._answer(method, params)
        if fault == "lose":
            raise ChainError("the answer was lost")
        await asyncio.sleep(0)
        return answer

    def _answer(self, method: str, params: Sequence[Any]) -> Mapping[str, Any]:
        match method:
            case "eth_call" | "eth_estimateGas":
                reason = self._reason(params[0])
                if reason is not None:
                    return {"error": {"code": 3, "message": f"execution reverted: {reason}"}}
                return {"result": "0x" if method == "eth_call" else hex(self.gas)}
            case "eth_getBlockByNumber":
                return {"result": self._block(*params)}
            case "eth_getBalance":
                return {"result": hex(self.balance)}
            case "eth_gasPrice":
                return {"result": hex(10)}
            case "eth_getTransactionCount":
                return {"result": hex(self._count(*params))}
            case "eth_getTransactionReceipt":
                ok = self.mined.get(params[0])
                number = hex(self.blocks.get(params[0], 1))
                block = {"blockNumber": number, "status": "0x1" if ok else "0x0", **COST}
                return {"result": None if ok is None else block}
            case "eth_getTransactionByHash":
                known = params[0] in self.mined or params[0] in self.pool
                return {"result": {} if known else None}
            case "eth_sendRawTransaction":
                return self._take(bytes.fromhex(params[0][2:]))
        raise AssertionError(method)

    def _block(self, tag: str, whole: bool) -> dict[str, Any]:
        number = self.head if tag == "latest" else int(tag, 16)
        fee = {} if self.base_fee is None else {"baseFeePerGas": hex(self.base_fee)}
        sent = [
            {"hash": tx_hash, "from": self.senders[tx_hash][0], "nonce": self.senders[tx_hash][1]}
            for tx_hash in self.mined
            if self.blocks.get(tx_hash, 1) == number and tx_hash in self.senders
        ]
        sent += [
            {"hash": "0x" + f"{nonce:064x}", "from": account.lower(), "nonce": hex(nonce)}
            for account, nonce, block in self.others
            if block == number
        ]
        there = sent if whole else [each["hash"] for each in sent]
        return {"number": hex(number), "timestamp": hex(number), "transactions": there, **fee}

    def _count(self, account: str, tag: str) -> int:
        if tag == "latest" or int(tag, 16) >= self.head:
            return self.counts[account]
        there = [b for a, _, b in self.others if a == account]
        there += [self.blocks.get(h, 1) for h in self.mined if self.senders[h][0] == account]
        return sum(block <= int(tag, 16) for block in there)

    def take_nonce(self, account: str) -> None:
        """Somebody else with the account's key sends the next one."""
        self.head += 1
        self.others.append((account, self.counts[account], self.head))
        self.counts[account] += 1

    def _reason(self, call: Mapping[str, Any]) -> str | None:
        data = str(call["data"])
        return "Illegal previous task state" if data in self.done else self.refusing.get(data)

    def _take(self, raw: bytes) -> Mapping[str, Any]:
        tx, tx_hash = json.loads(raw), "0x" + keccak(raw).hex()
        if self.refuse_sends:
            return {"error": {"code": -32000, "message": "not today"}}
        if tx_hash in self.pool or tx_hash in self.mined:
            return {"error": {"code": -32000, "message": "already known"}}
        if tx["nonce"] < self.counts[tx["account"]]:
            return {"error": {"code": -32000, "message": "nonce too low"}}
        if why := self.rule(tx):
            return {"error": {"code": -32000, "message": why}}
        self.pool[tx_hash] = tx
        self.senders[tx_hash] = tx["account"], hex(tx["nonce"])
        return {"result": tx_hash}

    def mine(self) -> None:
        moved = True
        while moved:
            moved = False
            for tx_hash, tx in list(self.pool.items()):
                if tx["nonce"] < self.counts[tx["account"]]:
                    del self.pool[tx_hash]
                elif tx["nonce"] == self.counts[tx["account"]]:
                    del self.pool[tx_hash]
                    moved = True
                    self.counts[tx["account"]] += 1
                    data = tx["data"]
                    ok = data not in self.done and data not in self.reverting
                    self.mined[tx_hash] = ok
                    self.blocks.setdefault(tx_hash, self.head)
                    self.done += [data] if ok else []


class FakeSigner:
    def sign_transaction(self, account: Address, transaction: Mapping[str, int | str], /) -> bytes:
        return json.dumps({"account": account, **transaction}, sort_keys=True).encode()


COST = {"gasUsed": hex(50_000), "effectiveGasPrice": hex(9)}
SPENT = 450_000


class Crash(Exception):
    pass


class CrashingOutbox(Outbox):
    """`crash` names the step after which the process dies; `signed` has what was ever signed."""

    crash = ""
    signed: list[tuple[str, Signed]]

    async def _sign(self, row: OutboxRow) -> Signed | None:
        signed = await super()._sign(row)
        self._die("sign")
        return signed

    def _store(self, row: OutboxRow, signed: Signed) -> OutboxRow:
        stored = super()._store(row, signed)
        self.signed.append((row.intent.key, signed))
        self._die("store")
        return stored

    async def _broadcast(self, row: OutboxRow) -> None:
        if self.crash == "send":
            assert row.signed is not None
            await self._rpc.send(row.signed.raw)
            self._die("send")
        await super()._broadcast(row)

    def _die(self, step: str) -> None:
        if self.crash == step:
            raise Crash(step)


class World:
    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'journal.db'}"
        self.chain = FakeChain()
        self.now = 1000.0
        self.settings = OutboxSettings()
        self.signed: list[tuple[str, Signed]] = []
        self.resolved: list[tuple[str, RowState]] = []
        self.start()

    def start(self) -> None:
        self.journal = SqlJournal(self.url)
        lease = self.journal.acquire("me", Timestamp(self.now), 60.0)
        assert lease is not None
        self.lease: Lease = lease
        self.outbox = CrashingOutbox(
            Rpc(self.chain),
            self.journal,
            lambda: lease,
            FakeSigner(),
            lambda: Timestamp(self.now),
            1,
            self.settings,
            lambda row: self.resolved.append((row.intent.key, row.state)),
        )
        self.outbox.signed = self.signed

    def restart(self) -> None:
        self.journal.close()
        self.start()

    def row(self, key: str) -> OutboxRow:
        with self.journal.read() as connection:
            row = by_key(connection, key)
        assert row is not None
        return row

    async def settle(self) -> None:
        for _ in range(6):
            await self.outbox.pump()
            self.chain.mine()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


def gas(world: World) -> int:
    """What the journal says that was spent."""
    return sum(each.gas for each in world.journal.takings(HOUR, 0, 10**9).steps.values())


def score(task: Commitment = TASK, data: bytes = b"score", account: Address = ALICE) -> Intent:
    return task_intent(account, task, Claim.SCORE, CONTRACT, data)


async def test_a_score_is_signed_stored_sent_and_mined(world: World) -> None:
    assert world.outbox.ensure(score()) is RowState.NEW
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.OPEN}
    await world.outbox.pump()
    (sent,) = world.chain.pool.values()
    assert sent == {
        "account": ALICE,
        "chainId": 1,
        "nonce": 0,
        "gasPrice": 12,
        "gas": 104_000,
        "to": CONTRACT,
        "value": 0,
        "data": "0x" + b"score".hex(),
    }
    world.chain.mine()
    await world.outbox.pump()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}
    assert world.outbox.ensure(score()) is RowState.MINED
    assert world.resolved == [(score().key, RowState.MINED)]
    assert world.outbox.writes(Commitment("0x" + "02" * 32)) == {}


async def test_what_would_revert_is_refused_unsent_and_tried_again_later(world: World) -> None:
    data = "0x" + b"score".hex()
    world.chain.refusing[data] = "Illegal previous task state"
    world.outbox.ensure(score())
    await world.outbox.pump()
    assert world.chain.pool == {} and world.signed == []
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.REFUSED}
    assert world.row(score().key).reason == "Illegal previous task state"
    assert world.outbox.ensure(score()) is RowState.REFUSED  # too soon
    world.now += 5
    del world.chain.refusing[data]
    assert world.outbox.ensure(score()) is RowState.NEW
    await world.settle()
    assert world.outbox.writes(TASK) == {Claim.SCORE: WriteState.DONE}


@pytest.mark.parametrize(("reason", "again"), [("Wrong task", 15), ("Timeout not reached", 1)])
async def test_what_the_contract_says_sets_when_it_is_tried_again(
    world: World, reason: str, again: float
) -> None:
    world.chain.refusing["0x" + b"score".hex()] = reason
    world.outbox.ensure(score())
    await world.outbox.pump()
    world.now += again - 0.5
    assert world.outbox.ensure(score()) is RowState.REFUSED
    world.now += 1.0
    assert world.outbox.ensure(score()) is RowState.NEW


async def test_more_gas_than_the_cap_is_refused(world: World) -> None:
    world.chain.gas = 4_000_000
    world.outbox.ensure(score())
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.REFUSED


async def test_a_reverted_one_is_signed_anew_with_a_new_nonce(world: World) -> None:
    data = "0x" + b"score".hex()
    world.chain.reverting.add(data)
    world.outbox.ensure(score())
    await world.settle()
    assert world.row(score().key).state is RowState.REVERTED
    world.chain.reverting.clear()
    world.now += 5
    world.outbox.ensure(score())
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [0, 1]
    assert world.chain.done == [data]
    assert gas(world) == 2 * SPENT, "what reverts costs too"


@pytest.mark.parametrize("state", ["new", "sent", "mined", "refused"])
async def test_an_answer_never_becomes_another(world: World, state: str) -> None:
    if state == "refused":
        world.chain.refusing["0x" + b"score".hex()] = "no"
    world.outbox.ensure(score())
    if state != "new":
        await world.outbox.pump()
    if state == "mined":
        await world.settle()
    assert world.row(score().key).state.value == state
    world.now += 100
    with pytest.raises(IllegalMove):
        world.outbox.ensure(score(data=b"other"))
    with pytest.raises(IllegalMove):
        world.outbox.ensure(task_intent(ALICE, TASK, Claim.ERROR, CONTRACT, b"error"))
    assert world.row(score().key).intent == score()
    world.outbox.ensure(task_intent(ALICE, TASK, Claim.ABORT, CONTRACT, b"abort"))


@pytest.mark.parametrize("fault", ["drop", "lose"])
async def test_a_lost_answer_sends_the_same_bytes_again(world: World, fault: str) -> None:
    world.chain.faults = [fault]
    world.outbox.ensure(score())
    with pytest.raises(ChainError):
        await world.outbox.pump()
    assert world.row(score().key).state is RowState.SIGNED
    world.restart()
    await world.settle()
    assert world.row(score().key).state is RowState.MINED
    assert len(world.signed) == 1


async def test_mined_before_the_crash_was_noticed(world: World) -> None:
    world.outbox.crash = "send"
    world.outbox.ensure(score())
    with pytest.raises(Crash):
        await world.outbox.pump()
    world.chain.mine()
    world.restart()
    await world.settle()
    assert world.row(score().key).state is RowState.MINED


async def test_what_fell_out_of_the_pool_is_sent_again(world: World) -> None:
    world.outbox.ensure(score())
    await world.outbox.pump()
    world.chain.pool.clear()
    await world.outbox.pump()
    assert world.chain.pool == {}
    world.now += 30
    await world.settle()
    assert world.row(score().key).state is RowState.MINED
    assert len(world.signed) == 1


async def test_a_nonce_taken_by_another_is_given_up_only_after_a_while(world: World) -> None:
    world.outbox.crash = "store"
    world.outbox.ensure(score())
    with pytest.raises(Crash):
        await world.outbox.pump()
    world.restart()
    world.chain.counts[ALICE] = 1
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.SIGNED
    world.now += 61
    await world.outbox.pump()
    assert world.row(score().key).state is RowState.REFUSED
    world.now += 5
    world.outbox.ensure(score())
    await world.settle()
    assert [signed.nonce for _, signed in world.signed] == [0, 1]
    assert len(world.chain.done) == 1


async def test_a_mined_one_whose_block_was_replaced_is_sent_again(world: World) -> None:
    world.outbox.ensure(score())
    await world.settle()
    world.chain.mined.clear()
    world.chain.done.clear()
    world.chain.counts.clear()
    world.now += 60
    assert world.outbox.ensure(score()) is RowState.SENT
    await world.settle()
    assert world.row(score().key).state is RowState.MINED
    assert len(world.signed) == 1


async def test_an_endpoint_that_lags_gives_no_used_nonce(world: World) -> None:
    world.outbox.ensure(score())
    await world.settle()
    world.chain.counts[ALICE] = 0
    other = score(Commitment("0x" + "02" * 32), b"second")
    world.outbox.ensure(other)
    with pytest.raises(ChainError):
        await world.outbox.pump()
    assert world.row(other.key).state is RowState.NEW
    world.chain.counts[ALICE] = 1
    await world.settle()
    assert world.row(other.key).state is RowState.MINED


async def test_one_accounts_trouble_is_not_anothers(world: World) -> None:
    world.outbox.ensure(score())
    await world.outbox.pump()
    world.chain.pool.clear()
    world.chain.refuse_sends = True
    world.now += 30
    world.outbox.ensure(score(Commitment("0x" + "02" * 32), b"bobs", BOB))
    with pytest.raises(ChainError):
        await world.outbox.pump()
    world.chain.refuse_sends = False
    await world.settle()
    assert len(world.chain.done) == 2


async def test_who_lost_the_lease_signs_nothing_that_is_sent(world: World) -> None:
    world.outbox.ensure(score())
    assert world.journal.acquire("other", Timestamp(world.now + 100), 60.0) is not None
    with pytest.raises(LeaseLost):
        await world.outbox.pump()
    with pytest.raises(LeaseLost):
        world.outbox.ensure(score(Commitment("0x" + "02" * 32)))
    assert world.chain.pool == {} and world.signed == []


async def test_a_tasks_write_goes_before_the_accounts_own(world: World) -> None:
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    world.outbox.ensure(score())
    await world.settle()
    assert world.chain.done == ["0x" + b"score".hex(), "0x" + b"pause".hex()]


async def test_a_verb_can_be_done_again_after_it_was_done(world: World) -> None:
    for _ in range(2):
        world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
        world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
        await world.settle()
        world.chain.done.clear()
    for _ in range(2):
        world.outbox.ensure_verb(ALICE, "model:m", CONTRACT, b"model", once=True)
        await world.settle()
    keys = [key for key, _ in world.signed]
    assert keys == [
        f"account:{ALICE}:pause:0",
        f"account:{ALICE}:pause:1",
        f"account:{ALICE}:model:m:0",
    ]


@contextlib.asynccontextmanager
async def pumping(world: World, poll: float) -> AsyncIterator[None]:
    world.settings = OutboxSettings(poll=poll)
    world.restart()
    running = asyncio.create_task(world.outbox.run())
    await asyncio.sleep(0.01)
    try:
        # Only what hangs takes so long.
        async with asyncio.timeout(60):
            yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_run_moves_on_what_is_ensured(world: World) -> None:
    async with pumping(world, poll=0.02):
        world.outbox.ensure(score())
        while world.outbox.writes(TASK) != {Claim.SCORE: WriteState.DONE}:  # noqa: ASYNC110
            world.chain.mine()
            await asyncio.sleep(0.01)


async def test_what_is_ensured_waits_for_no_poll(world: World) -> None:
    async with pumping(world, poll=1000.0):
        intent = score()
        world.outbox.ensure(intent)
        while world.row(intent.key).state is not RowState.SENT:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- any crash, anywhere ------------------------------------------------------------------------

TASKS = tuple(Commitment(f"0x{index:064x}") for index in range(1, 4))
STEPS = st.one_of(
    st.tuples(st.just("ensure"), st.integers(0, 2), st.sampled_from([ALICE, BOB])),
    st.tuples(st.just("pump"), st.sampled_from(["", "sign", "store", "send", "drop", "lose"])),
    st.tuples(st.just("mine")),
    st.tuples(st.just("forget")),
    st.tuples(st.just("restart")),
    st.tuples(st.just("refuse"), st.integers(0, 2)),
    st.tuples(st.just("revert"), st.integers(0, 2)),
    st.tuples(st.just("later"), st.sampled_from([2.0, 30.0, 90.0])),
)


def data_of(index: int) -> bytes:
    return b"score" + bytes([index])


async def pump(world: World, how: str) -> None:
    world.chain.faults = [how] if how in {"drop", "lose"} else []
    world.outbox.crash = "" if world.chain.faults else how
    try:
        await world.outbox.pump()
    except Crash:
        world.restart()
    except NetworkUnavailable:
        pass
    world.outbox.crash, world.chain.faults = "", []


async def take(world: World, step: tuple[Any, ...], owners: dict[int, Address]) -> None:
    chain = world.chain
    match step:
        case ("ensure", index, account):
            owner = owners.setdefault(index, account)
            world.outbox.ensure(score(TASKS[index], data_of(index), owner))
        case ("pump", how):
            await pump(world, how)
        case ("mine",):
            chain.mine()
        case ("forget",):
            chain.pool.clear()
        case ("restart",):
            world.restart()
        case ("refuse", index):
            chain.refusing["0x" + data_of(index).hex()] = "not now"
        case ("revert", index):
            chain.reverting.add("0x" + data_of(index).hex())
        case ("later", seconds):
            world.now += seconds


def check(world: World, before: int, dead: set[str]) -> None:
    """What was signed anew since `before` was signed only after its former bytes were dead."""
    for index in range(before, len(world.signed)):
        key, signed = world.signed[index]
        former = {each.tx_hash for k, each in world.signed[:index] if k == key}
        assert former <= dead, f"{key}: two transactions alive"
        assert signed.tx_hash not in former
    done = world.chain.done
    assert len(done) == len(set(done))


async def scenario(folder: Path, steps: Sequence[tuple[Any, ...]]) -> None:
    world = World(folder)
    owners: dict[int, Address] = {}
    for step in steps:
        before = len(world.signed)
        dead = {tx_hash for tx_hash, ok in world.chain.mined.items() if not ok}
        await take(world, step, owners)
        check(world, before, dead)
    world.chain.refusing.clear()
    world.chain.reverting.clear()
    for _ in range(4):
        world.now += 90.0
        for index, owner in owners.items():
            world.outbox.ensure(score(TASKS[index], data_of(index), owner))
        await world.settle()
    assert sorted(world.chain.done) == sorted("0x" + data_of(index).hex() for index in owners)
    assert world.chain.pool == {}, "a gap in the nonces"
    for index in owners:
        assert world.outbox.writes(TASKS[index]) == {Claim.SCORE: WriteState.DONE}
    world.journal.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_no_crash_makes_two_answers_or_a_gap(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Path(folder), steps))


def test_wei_travels_whole(world: World) -> None:
    stake = Wei(400 * 10**18)
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join", stake)
    assert world.row(f"account:{ALICE}:join:0").intent.value == stake


# --- what is on its way, by account ---------------------------------------------------------------


async def test_what_is_on_its_way_shows_for_both_who_sends_and_who_gets_it(world: World) -> None:
    assert world.outbox.movements() == {}
    world.outbox.ensure(score())
    await world.settle()
    assert world.outbox.movements() == {}  # a task's write is no account's own
    world.outbox.ensure_verb(ALICE, f"fund:{BOB}", BOB, b"", Wei(5))
    assert world.outbox.movements()[BOB] == Movement(is_open=True, paying=True)
    assert world.outbox.movements()[ALICE] == Movement(is_open=True, owes=Wei(5))
    await world.settle()
    paid = world.outbox.movements()[BOB]
    assert paid.block == paid.paid_block > 0
    assert not paid.is_open
    assert not paid.paying
    # Another of its own doesn't count as paid to it.
    world.outbox.ensure_verb(BOB, "pause", CONTRACT, b"pause")
    own = world.outbox.movements()[BOB]
    assert (own.is_open, own.paying, own.paid_block) == (True, False, paid.paid_block)
    await world.settle()
    assert not world.outbox.movements()[BOB].is_open


async def test_what_was_refused_is_on_its_way_no_more(world: World) -> None:
    world.chain.refusing["0x" + b"join".hex()] = "Network is full"
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    await world.outbox.pump()
    assert not world.outbox.movements()[ALICE].is_open
    # It isn't pressed: nothing that refuses an account's own write passes in a second.
    world.now += 14
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    assert not world.outbox.movements()[ALICE].is_open
    world.now += 2
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    assert world.outbox.movements()[ALICE].is_open


def refusals(world: World, account: Address = ALICE) -> list[tuple[str, str, float]]:
    """What is refused of the account, and in how many seconds it may be asked for again."""
    there = world.outbox.movements().get(account, Movement())
    return [(each.verb, each.reason, each.again - world.now) for each in there.refused]


async def test_what_is_refused_again_and_again_is_tried_more_and_more_seldom(world: World) -> None:
    data = "0x" + b"join".hex()
    world.chain.refusing[data] = "Network is full"
    waits: list[float] = []
    for _ in range(10):
        assert world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join") is RowState.NEW
        await world.outbox.pump()
        ((verb, reason, wait),) = refusals(world)
        assert (verb, reason) == ("join", "Network is full")
        waits.append(wait)
        world.now += wait - 0.5
        state = world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
        assert state is RowState.REFUSED, "too soon"
        world.now += 1
    assert waits == [15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 900.0, 900.0, 900.0, 900.0]
    # It is refused still while it is tried again, and also for who begins anew.
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    assert [reason for _, reason, _ in refusals(world)] == ["Network is full"]
    await world.outbox.pump()
    world.restart()
    assert [reason for _, reason, _ in refusals(world)] == ["Network is full"]
    world.now += 900
    del world.chain.refusing[data]
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    await world.settle()
    assert refusals(world) == []
    # The next of its kind begins with no grudge.
    world.chain.done.clear()
    world.chain.refusing[data] = "Network is full"
    world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
    await world.outbox.pump()
    assert refusals(world) == [("join", "Network is full", 15.0)]


async def test_a_payment_that_is_refused_shows_for_who_would_get_it(world: World) -> None:
    world.chain.gas = 10**7
    world.outbox.ensure_verb(ALICE, f"fund:{BOB}", BOB, b"", Wei(5))
    await world.outbox.pump()
    ((verb, reason, _),) = refusals(world, BOB)
    assert verb == "fund"
    assert "more than the cap" in reason


async def test_what_reverts_waits_as_what_is_refused(world: World) -> None:
    world.chain.reverting.add("0x" + b"join".hex())
    for expected in (15.0, 30.0):
        world.outbox.ensure_verb(ALICE, "join", CONTRACT, b"join")
        await world.settle()
        ((_, reason, wait),) = refusals(world)
        assert reason.startswith("reverted in block")
        assert wait == expected
        world.now += wait


# --- what accounts lack ---------------------------------------------------------------------------


async def test_what_an_account_lacks_for_a_write_is_known_until_it_has_it(world: World) -> None:
    world.chain.balance = 10**6
    world.outbox.ensure(score())
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    need = 104_000 * 12
    assert world.outbox.movements()[ALICE] == Movement(lacks=Wei(need - 10**6))
    # What it is to pay belongs to it.
    world.outbox.ensure_verb(BOB, "join", CONTRACT, b"join", Wei(400))
    with pytest.raises(ChainError):
        await world.outbox.pump()
    assert world.outbox.movements()[BOB].lacks == need + 400 - 10**6
    world.chain.refusing["0x" + b"join".hex()] = "Network is full"
    with pytest.raises(ChainError):
        await world.outbox.pump()
    assert world.outbox.movements()[BOB].lacks == 0
    world.chain.balance = 10**18
    await world.settle()
    assert world.outbox.movements().get(ALICE, Movement()).lacks == 0


async def test_what_cannot_be_paid_holds_nothing_up(world: World) -> None:
    """A stake for which the treasury has too little, and gas that somebody waits for."""
    world.chain.balance = 10**17
    world.outbox.ensure_verb(ALICE, f"fund:{BOB}", BOB, b"", Wei(4 * 10**17))
    with pytest.raises(ChainError, match="top it up"):
        await world.outbox.pump()
    assert world.outbox.movements()[ALICE].owes == 0, "what it has is there to be used"
    world.outbox.ensure_verb(ALICE, f"gas:{CONTRACT}", CONTRACT, b"", Wei(3))
    for _ in range(3):
        with pytest.raises(ChainError, match="top it up"):
            await world.outbox.pump()
        world.chain.mine()
        world.chain.done.clear()
    assert world.row(f"account:{ALICE}:gas:{CONTRACT}:0").state is RowState.MINED
    assert world.row(f"account:{ALICE}:fund:{BOB}:0").state is RowState.NEW
    world.chain.balance = 10**18
    await world.settle()
    assert world.row(f"account:{ALICE}:fund:{BOB}:0").state is RowState.MINED


async def test_what_is_on_its_way_is_owed(world: World) -> None:
    for recipient, amount in ((BOB, 10**17), (CONTRACT, 3)):
        world.outbox.ensure_verb(ALICE, f"fund:{recipient}", recipient, b"", Wei(amount))
    assert world.outbox.movements()[ALICE].owes == 10**17 + 3
    assert world.outbox.movements()[BOB].owes == 0
    await world.settle()
    assert world.outbox.movements()[ALICE].owes == 0


async def test_a_report_of_a_model_moves_no_account(world: World) -> None:
    world.outbox.ensure_verb(ALICE, "model:base:a", CONTRACT, b"a", once=True)
    assert world.outbox.movements()[ALICE] == Movement(reports=True)
    await world.settle()
    there = world.outbox.movements().get(ALICE, Movement())
    assert (there.is_open, there.block, there.reports) == (False, 0, False)
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    assert world.outbox.movements()[ALICE] == Movement(is_open=True)


# --- after a million of them ----------------------------------------------------------------------


async def test_what_accounts_did_is_read_once_and_again_when_one_did_something(
    world: World,
) -> None:
    world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    await world.settle()
    first = world.outbox.movements()
    asked = plans(world.journal, world.outbox.movements)
    assert not any("GROUP BY" in statement for statement in asked)
    world.outbox.ensure_verb(ALICE, "resume", CONTRACT, b"resume")
    assert world.outbox.movements()[ALICE].is_open and not first[ALICE].is_open


def test_an_accounts_own_writes_are_found_among_its_tasks(world: World) -> None:
    asked = plans(
        world.journal, lambda: world.outbox.ensure_verb(ALICE, "pause", CONTRACT, b"pause")
    )
    assert scanned(asked) == ["SCAN lease"], "one row"
    own = [plan for statement, plan in asked.items() if "task IS NULL" in statement]
    assert own
    assert all("outbox_by_owner (account=? AND task=?)" in str(plan) for plan in own)
