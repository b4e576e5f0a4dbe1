"""What the doctor finds without a network; what it finds of one, an integration test says."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import sys
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import doctor, keystore
from cluster.assembly import owner
from cluster.chain.rpc import Rpc
from cluster.checks import Check, Level, fail, ok, warn, worst
from cluster.config import WEI_PER_CNX, Config
from cluster.core import standing
from cluster.core.errors import ChainError
from cluster.core.standing import Standing
from cluster.core.types import Address, GigaBytes, GpuClass, NodeStatus, Timestamp, Wei
from cluster.doctor_journal import check_journal
from cluster.doctor_money import Account, balances, beyond, check_money, needs, wanted
from cluster.identity import Identity
from cluster.journal import HOST, STANDING, Assignment, SqlJournal
from tests.unit.fake_nvml import FakeCard, FakeNvml
from tests.unit.test_identity import FIRST, PHRASE
from tests.unit.test_runtime import OTHER_PHRASE

ADDRESS = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
WORD = "correct horse"
TREASURY = Address(FIRST[0])


def config(folder: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "network": {
                "rpc_url": "http://127.0.0.1:1",
                "chain_id": 31337,
                "devnet": True,
                "contracts": {"task": ADDRESS, "node": ADDRESS, "qos": ADDRESS},
                "relay_url": "http://127.0.0.1:1",
            },
            **sections,
        },
        context={"base": folder},
    )


def key(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "key"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_keys_good_bad_and_in_plain_text(tmp_path: Path) -> None:
    identity, check = doctor.check_key(config(tmp_path), {})
    assert identity is None
    assert check.level is Level.FAIL
    assert "keys new" in check.mend

    key(tmp_path, PHRASE)
    plain = config(tmp_path, identity={"seed_file": "key"})
    identity, check = doctor.check_key(plain, {})
    assert identity is not None
    assert (check.level, FIRST[0] in check.found) == (Level.WARN, True)

    key(tmp_path, PHRASE, 0o644)
    identity, check = doctor.check_key(plain, {})
    assert (identity, check.level) == (None, Level.FAIL)
    assert "chmod 600" in check.found

    key(tmp_path, keystore.seal_phrase(PHRASE, WORD, FIRST[0], 2**4))
    sealed = config(tmp_path, identity={"keystore_file": "key"})
    assert doctor.check_key(sealed, {})[1].level is Level.FAIL
    assert doctor.check_key(sealed, {keystore.PASSWORD: WORD})[1].level is Level.OK
    assert doctor.check_key(sealed, {}, lambda: WORD)[1].level is Level.OK


def journal_checks(settings: Config, now: float = 100.0) -> list[Check]:
    return check_journal(settings, None, lambda: now)


def test_a_journal_that_isnt_there_is_not_made(tmp_path: Path) -> None:
    settings = config(tmp_path, journal={"url": "sqlite:///new/j.db"})
    (check,) = journal_checks(settings)
    assert check == ok("journal", "none yet: it is made as the operator starts")
    assert not (tmp_path / "new").exists()


def held(folder: Path, host: str | None = None) -> Config:
    """A journal whose lease somebody holds until 110."""
    settings = config(folder, journal={"url": "sqlite:///j.db"})
    journal = SqlJournal(settings.journal.url)
    lease = journal.acquire("somebody", Timestamp(100.0), 10.0)
    assert lease is not None
    if host is not None:
        journal.set_cursor(lease, HOST, host)
    journal.close()
    return settings


def test_the_journal_and_who_holds_its_lease(tmp_path: Path) -> None:
    settings = held(tmp_path, socket.gethostname())
    (check,) = journal_checks(settings, 104.0)
    assert check.level is Level.OK
    assert "holds the lease for 6 s more" in check.found
    (check,) = journal_checks(settings, 111.0)
    assert "nobody holds" in check.found


@pytest.mark.parametrize("name", ["j.db", "j.db-wal"])
def test_a_journal_of_another_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = held(tmp_path)
    (tmp_path / "j.db-wal").touch()
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != name and allowed(path, mode)
    )
    check, *_ = journal_checks(settings)
    assert (check.level, check.found) == (Level.FAIL, f"it can't be written: {name} is another's")
    assert "chown" in check.mend


def test_a_lease_that_another_machine_holds_is_a_warning(tmp_path: Path) -> None:
    settings = held(tmp_path, "far-away")
    (check,) = journal_checks(settings, 104.0)
    assert check.level is Level.WARN
    assert "far-away" in check.found
    assert "journal.url" in check.mend
    assert journal_checks(settings, 111.0)[0].level is Level.OK


@pytest.mark.parametrize(
    ("schema", "level", "said"),
    [("2", Level.WARN, "schema 2"), ("99", Level.FAIL, "schema 99")],
)
def test_a_journal_of_another_version_is_told_and_left_as_it_is(
    tmp_path: Path, schema: str, level: Level, said: str
) -> None:
    settings = held(tmp_path)
    file = tmp_path / "j.db"
    with contextlib.closing(sqlite3.connect(file)) as made:
        made.execute("UPDATE cursors SET value = ? WHERE key = 'schema'", (schema,))
        if schema == "2":
            made.execute("ALTER TABLE outbox DROP COLUMN cost")
        made.commit()
    check, *_ = journal_checks(settings)
    assert check.level is level
    assert said in check.found
    assert check.mend
    with contextlib.closing(sqlite3.connect(file)) as after:
        found = after.execute("SELECT value FROM cursors WHERE key = 'schema'").fetchone()
        columns = [row[1] for row in after.execute("PRAGMA table_info(outbox)")]
    assert found == (schema,)
    assert ("cost" in columns) == (schema != "2")


def test_another_identitys_journal_fails(tmp_path: Path) -> None:
    settings = held(tmp_path)
    journal = SqlJournal(settings.journal.url)
    theirs = Identity.from_phrase(OTHER_PHRASE)
    journal.bind(owner(settings, theirs))
    ours = Identity.from_phrase(PHRASE)
    assert check_journal(settings, ours, lambda: 0.0)[0].level is Level.OK, "it is empty"
    lease = journal.acquire("me", Timestamp(200.0), 1.0)
    assert lease is not None
    assignment = Assignment(1, theirs.address(1), GpuClass("Card", GigaBytes(8)))
    journal.assign(lease, assignment)
    journal.close()
    check, *_ = check_journal(settings, ours, lambda: 0.0)
    assert check.level is Level.FAIL
    assert "was begun with" in check.found
    assert check_journal(settings, theirs, lambda: 0.0)[0].level is Level.OK


def test_a_journal_that_cant_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x" * 5000)
    settings = config(tmp_path, journal={"url": "sqlite:///file"})
    (check,) = journal_checks(settings)
    assert check.level is Level.FAIL


def test_accounts_that_are_stopped_are_told(tmp_path: Path) -> None:
    settings = held(tmp_path)
    journal = SqlJournal(settings.journal.url)
    lease = journal.acquire("me", Timestamp(200.0), 1.0)
    assert lease is not None
    assert [each.name for each in journal_checks(settings, 0.0)] == ["journal"]
    journal.mark_slashed(lease, Address("0xaa"), Timestamp(0.0))
    strange = Standing(held="did somebody else use its key?")
    journal.set_cursor(lease, f"{STANDING}0xbb", standing.text(strange))
    journal.set_cursor(lease, f"{STANDING}0xcc", standing.text(Standing()))
    journal.close()
    _, check = journal_checks(settings, 0.0)
    assert check.level is Level.WARN
    assert check.found == "0xaa was slashed; 0xbb: did somebody else use its key?"
    assert "fleet clear" in check.mend


def test_disks(tmp_path: Path) -> None:
    found = doctor.check_disk(config(tmp_path, models={"root": "m", "spare_gb": 0.0}))
    assert [check.name for check in found] == ["artifacts.path", "models.root", "journal.url"]
    assert all("GB free" in check.found for check in found)
    full = doctor.check_disk(config(tmp_path, models={"root": "m", "spare_gb": 1e9}))
    assert full[1].level is Level.WARN
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").write_text("no folder")
    nowhere = doctor.check_disk(config(tmp_path, journal={"url": "sqlite:///file/j.db"}))
    assert nowhere[2].level is Level.FAIL
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".store").write_text("no folder")
    anothers = doctor.check_disk(config(tmp_path, models={"root": "m"}))
    assert anothers[1].level is Level.FAIL
    assert ".store: Not a directory" in anothers[1].found
    elsewhere = config(tmp_path, journal={"url": "postgresql://me@there/db"})
    assert len(doctor.check_disk(elsewhere)) == 2


def test_the_journals_own_disk_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1 if path == tmp_path / "state" else 2**40)

    monkeypatch.setattr("shutil.disk_usage", usage)
    (tmp_path / "state").mkdir()
    found = doctor.check_disk(config(tmp_path, journal={"url": "sqlite:///state/j.db"}))
    assert [check.level for check in found] == [Level.OK, Level.OK, Level.WARN]


def test_models_that_arent_there(tmp_path: Path) -> None:
    assert doctor.check_models(config(tmp_path)).level is Level.OK
    pinned = {"root": "m", "pin": ["base:acme/tiny"]}
    check = doctor.check_models(config(tmp_path, models=pinned))
    assert check.level is Level.WARN
    assert check.mend.startswith("crynux-cluster models fetch base:acme/tiny")
    check = doctor.check_models(config(tmp_path, models={**pinned, "sources": []}))
    assert check.level is Level.FAIL


@pytest.mark.parametrize(
    ("card", "level", "count", "says"),
    [
        (FakeCard(), Level.OK, 1, "1: NVIDIA GeForce RTX 4090+docker"),
        (FakeCard(capability=(7, 0)), Level.WARN, 1, "compute capability 7.0"),
        (FakeCard(mig=(1, 1)), Level.FAIL, None, "MIG cuts it into instances"),
    ],
)
def test_cards_that_are_there_and_what_is_wrong_with_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    card: FakeCard,
    level: Level,
    count: int | None,
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(card))
    check, found = doctor.check_cards(config(tmp_path))
    assert (check.level, found) == (level, count)
    assert says in check.found


def test_cards_that_arent_there_and_simulated_ones(tmp_path: Path) -> None:
    check, count = doctor.check_cards(config(tmp_path))
    assert count is None
    assert check.level is Level.FAIL
    elsewhere = config(tmp_path, ray={"address": "10.0.0.1:6379"})
    assert doctor.check_cards(elsewhere)[0].level is Level.OK
    ray = {"simulated_gpus": [{"name": "Card", "vram": 8, "count": 3}]}
    expected = ok("GPUs", "3 simulated ones: a devnet")
    assert doctor.check_cards(config(tmp_path, ray=ray)) == (expected, 3)


@pytest.mark.parametrize(
    ("each", "there", "limit", "level"),
    [
        (8.0, 18, "max", Level.OK),
        (8.0, 17, "max", Level.WARN),
        (8.0, 64, str(17 * 2**30), Level.WARN),
        (8.0, 18, str(64 * 2**30), Level.OK),
        (7.5, 17, "max", Level.OK),
    ],
)
def test_memory_that_the_cards_would_take_and_isnt_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    each: float,
    there: int,
    limit: str,
    level: Level,
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", tmp_path / "memory.max")
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": there * 2**18}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeCard(), FakeCard()))
    (check,) = doctor.check_memory(config(tmp_path, gpu={"host_memory_gb": each}))
    assert (check.name, check.level) == ("memory", level)
    assert f"2 times {each:g} GiB" in check.found


def test_of_memory_nothing_is_said_where_no_card_is(tmp_path: Path) -> None:
    assert doctor.check_memory(config(tmp_path)) == []
    ray = {"simulated_gpus": [{"name": "Card", "vram": 8, "count": 3}]}
    assert doctor.check_memory(config(tmp_path, ray=ray)) == []


# --- Ray ------------------------------------------------------------------------------------------


def test_a_cluster_that_is_to_be_found_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[tuple[str, int]] = []

    def connect(where: tuple[str, int], _timeout: float) -> SimpleNamespace:
        reached.append(where)
        if where[1] != 6379:
            raise ConnectionRefusedError(111, "refused")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("socket.create_connection", connect)
    settings = config(tmp_path, ray={"address": "auto"})
    here = {"RAY_TMPDIR": str(tmp_path)}
    check = doctor.check_ray(settings, here)
    assert (check.level, reached) == (Level.FAIL, [])
    assert "no Ray cluster" in check.found

    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert doctor.check_ray(settings, here) == ok("Ray", "auto: 10.0.0.1:6379 answers")
    check = doctor.check_ray(settings, {**here, "RAY_ADDRESS": "10.0.0.2:1"})
    assert check.level is Level.FAIL
    assert reached == [("10.0.0.1", 6379), ("10.0.0.2", 1)]


# --- money ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "fleet", "accounts"),
    [
        (None, {}, 8),
        (3, {}, 3),
        (3, {"slots_per_gpu": 2}, 6),
        (30, {}, 8),
        (3, {"slots_per_gpu": "auto"}, 3),
        (3, {"stake_budget": 800}, 2),
        (None, {"stake_budget": 900}, 2),
        (0, {}, 0),
    ],
)
def test_as_many_accounts_need_money_as_cards_and_budget_have_use_for(
    tmp_path: Path, cards: int | None, fleet: dict[str, Any], accounts: int
) -> None:
    assert wanted(config(tmp_path, fleet=fleet), cards) == accounts


def account(status: NodeStatus, balance: str) -> Account:
    return Account(1, Address("0x1"), status, Wei(int(Decimal(balance) * WEI_PER_CNX)))


@pytest.mark.parametrize(
    ("status", "balance", "need"),
    [
        (NodeStatus.QUIT, "0", "400.05"),
        (NodeStatus.QUIT, "400.005", "0.045"),
        (NodeStatus.QUIT, "400.01", "0"),
        (NodeStatus.AVAILABLE, "0.001", "0.049"),
        (NodeStatus.AVAILABLE, "0.02", "0"),
        (NodeStatus.PAUSED, "0", "0.05"),
    ],
)
def test_what_an_account_needs_is_what_the_fleet_would_send_it(
    tmp_path: Path, status: NodeStatus, balance: str, need: str
) -> None:
    assert needs(config(tmp_path), account(status, balance)) == Decimal(need) * WEI_PER_CNX


OUT = account(NodeStatus.QUIT, "0")


@pytest.mark.parametrize(
    ("has", "level"),
    [("400.05", Level.WARN), ("400.059", Level.WARN), ("400.06", Level.OK), ("0", Level.WARN)],
)
def test_the_treasury_needs_gas_of_its_own_too(tmp_path: Path, has: str, level: Level) -> None:
    money = Wei(int(Decimal(has) * WEI_PER_CNX))
    check = balances(config(tmp_path), TREASURY, money, [OUT] * 8, cards=1)
    assert check.level is level
    if level is Level.WARN:
        assert "0 of 1 accounts" in check.found
        assert "send it" in check.mend
        assert "identity.accounts" not in check.mend


def test_a_treasury_that_has_nothing_to_pay_needs_nothing(tmp_path: Path) -> None:
    rich = account(NodeStatus.AVAILABLE, "1")
    assert balances(config(tmp_path), TREASURY, Wei(0), [rich], cards=1).level is Level.OK


def test_an_account_beyond_the_configurations_that_is_joined_is_told(tmp_path: Path) -> None:
    settings = config(tmp_path, identity={"accounts": 1})
    joined = replace(account(NodeStatus.BUSY, "1"), index=2)
    assert beyond(settings, [account(NodeStatus.BUSY, "1"), replace(OUT, index=2)]) is None
    check = beyond(settings, [joined])
    assert check is not None
    assert check.level is Level.WARN
    assert "account 2 (0x1) is joined" in check.found
    assert "identity.accounts" in check.mend


async def test_accounts_that_cant_be_read_fail(tmp_path: Path) -> None:
    async def away(_method: str, _params: object) -> Mapping[str, Any]:  # noqa: RUF029
        raise ChainError("the endpoint doesn't answer")

    (check,) = await check_money(config(tmp_path), Rpc(away), Identity.from_phrase(PHRASE), 1)
    assert check.level is Level.FAIL
    assert "doesn't answer" in check.found


# --- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "level"),
    [
        ([], Level.OK),
        ([ok("a", "b")], Level.OK),
        ([ok("a", "b"), warn("a", "b", "c")], Level.WARN),
        ([fail("a", "b", "c"), warn("a", "b", "c")], Level.FAIL),
    ],
)
def test_the_worst_decides(checks: list[Check], level: Level) -> None:
    assert worst(checks) is level
    assert all(check.plain()["level"] == check.level.value for check in checks)


def test_earnings_that_would_go_round_in_a_circle_are_found(tmp_path: Path) -> None:
    key(tmp_path, PHRASE)
    named = {"identity": {"seed_file": "key"}}
    assert doctor.check_earnings(config(tmp_path, **named), None) == []
    identity, _ = doctor.check_key(config(tmp_path, **named), {})
    assert doctor.check_earnings(config(tmp_path, **named), identity) == []
    for index, level in ((0, Level.OK), (2, Level.FAIL)):
        mine = config(tmp_path, **named, fleet={"beneficiary": FIRST[index]})
        (check,) = doctor.check_earnings(mine, identity)
        assert check.level is level
        assert FIRST[index] in check.found
