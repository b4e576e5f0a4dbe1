"""How the journal's database is opened; nothing is connected to here."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from cluster.journal_engine import open_engine

PATIENCE = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def asked_of_libpq(url: str, look_only: bool = False) -> dict[str, Any]:
    """What it would connect with."""
    engine = open_engine(url, look_only)
    asked: dict[str, Any] = {}

    @event.listens_for(engine, "do_connect")
    def _connecting(_dialect: Any, _record: Any, _plain: Any, named: dict[str, Any]) -> None:
        asked.update(named)
        raise ConnectionError("not here")

    with pytest.raises((ConnectionError, OperationalError)):
        engine.connect()
    return asked


@pytest.mark.parametrize("look_only", [False, True])
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_server_that_swallows_what_it_is_sent_is_noticed_in_seconds(
    scheme: str, look_only: bool
) -> None:
    asked = asked_of_libpq(f"{scheme}://me:pw@host/db?sslmode=require", look_only)
    assert {name: asked[name] for name in PATIENCE} == PATIENCE
    assert (asked["sslmode"], asked["host"], asked["dbname"]) == ("require", "host", "db")


def test_what_the_url_says_itself_holds() -> None:
    asked = asked_of_libpq("postgresql://me@host/db?connect_timeout=60&tcp_user_timeout=0")
    assert (asked["connect_timeout"], asked["tcp_user_timeout"]) == ("60", "0")
    assert asked["keepalives_idle"] == PATIENCE["keepalives_idle"]
