"""The password in two halves: neither tells it, both together do, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import handover
from cluster.core.errors import ConfigError
from cluster.handover import Handover, take

WORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "_MEMORY", tmp_path)


@pytest.mark.parametrize("word", [WORD, "ein Paßwort 🔑", "x" * 1000])
def test_the_coordinator_gets_it_once_each_time_it_is_offered(word: str) -> None:
    given = Handover.of(word)
    for _ in range(2):
        given.offer()
        given.offer()
        assert take(given.folder) == word
        with pytest.raises(ConfigError, match="password"):
            take(given.folder)
    given.remove()
    assert not given.folder.exists()
    with pytest.raises(ConfigError):
        take(given.folder)


def test_neither_half_tells_it_and_nobody_else_can_read_them() -> None:
    given = Handover.of(WORD)
    given.offer()
    files = {path: path.read_bytes() for path in given.folder.iterdir()}
    assert len(files) == 2
    for path, data in files.items():
        assert path.stat().st_mode & 0o777 == 0o600
        assert not any(WORD[i : i + 4].encode() in data for i in range(len(WORD) - 4))
    assert given.folder.stat().st_mode & 0o777 == 0o700
    assert WORD not in repr(given)


def test_one_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        Handover.of("x" * 1023)


def test_when_nobody_types_it_that_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.handover.sys.executable", "/bin/false")
    with pytest.raises(ConfigError, match="no password was given"):
        Handover.asked(tmp_path / "key.json")
    assert list(tmp_path.iterdir()) == []
