"""What the doctor finds without a network; what it finds of one, an integration test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import doctor, keystore
from cluster.config import Config
from cluster.core.types import Timestamp
from cluster.doctor import Check, Level, fail, ok, warn, worst
from cluster.journal import SqlJournal
from tests.unit.test_identity import FIRST, PHRASE

ADDRESS = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
WORD = "correct horse"


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


def test_the_journal_and_who_holds_its_lease(tmp_path: Path) -> None:
    settings = config(tmp_path, journal={"url": "sqlite:///j.db"})
    (check,) = doctor.check_journal(settings, None, lambda: 100.0)
    assert check == ok("journal", "can be written; nobody holds the lease")
    journal = SqlJournal(settings.journal.url)
    assert journal.acquire("somebody", Timestamp(100.0), 10.0) is not None
    (check,) = doctor.check_journal(settings, None, lambda: 104.0)
    assert "somebody holds the lease for 6 s more" in check.found
    (check,) = doctor.check_journal(settings, None, lambda: 111.0)
    assert "nobody holds" in check.found
    journal.close()


def test_a_journal_that_cant_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    settings = config(tmp_path, journal={"url": "sqlite:///file/j.db"})
    (check,) = doctor.check_journal(settings, None, lambda: 0.0)
    assert check.level is Level.FAIL


def test_disks(tmp_path: Path) -> None:
    found = doctor.check_disk(config(tmp_path, models={"root": "m", "spare_gb": 0.0}))
    assert [check.name for check in found] == ["artifacts.path", "models.root"]
    assert all("GB free" in check.found for check in found)
    full = doctor.check_disk(config(tmp_path, models={"root": "m", "spare_gb": 1e9}))
    assert full[1].level is Level.WARN
    assert not (tmp_path / "m").exists()


def test_models_that_arent_there(tmp_path: Path) -> None:
    assert doctor.check_models(config(tmp_path)).level is Level.OK
    pinned = {"root": "m", "pin": ["base:acme/tiny"]}
    check = doctor.check_models(config(tmp_path, models=pinned))
    assert check.level is Level.WARN
    assert check.mend.startswith("crynux-cluster models fetch base:acme/tiny")
    check = doctor.check_models(config(tmp_path, models={**pinned, "sources": []}))
    assert check.level is Level.FAIL


def test_cards_that_arent_there_and_simulated_ones(tmp_path: Path) -> None:
    check = doctor.check_cards(config(tmp_path))
    assert check.level is Level.FAIL
    elsewhere = config(tmp_path, ray={"address": "10.0.0.1:6379"})
    assert doctor.check_cards(elsewhere).level is Level.OK
    ray = {"simulated_gpus": [{"name": "Card", "vram": 8, "count": 3}]}
    assert doctor.check_cards(config(tmp_path, ray=ray)) == ok("GPUs", "3 simulated ones: a devnet")


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
