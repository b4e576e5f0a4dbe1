"""What an operator asks of the coordinator. No Ray is started here."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from actors import client
from actors.names import RAY_ADDRESS
from actors.pool import PING_SECONDS
from cluster.config import Config
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import Timestamp
from cluster.journal import SqlJournal
from cluster.journal_engine import file_of
from cluster.steering import ClearQuarantine
from tests.unit import old_journals

ADDRESS = "0x" + "11" * 20
CLEAR = ClearQuarantine(card="x")


def config(tmp_path: Path, address: str | None = None) -> Config:
    return Config.model_validate(
        {
            "network": {
                "rpc_url": "http://127.0.0.1:1",
                "chain_id": 31337,
                "contracts": {"task": ADDRESS, "node": ADDRESS, "qos": ADDRESS},
                "relay_url": "http://127.0.0.1:1",
            },
            "ray": {"address": address},
        },
        context={"base": tmp_path},
    )


class Method:
    def __init__(self, answer: object, asked: list[tuple[object, ...]]) -> None:
        self._answer = answer
        self._asked = asked

    def remote(self, *arguments: object) -> object:
        self._asked.append(arguments)
        return self._answer


class FakeRay:
    """As much of ray as `perform` uses; an answer that is an error is raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: object) -> None:
        self.answers = answers
        self.joined: list[dict[str, object]] = []
        self.left = 0
        self.asked: list[tuple[object, ...]] = []
        self.patience: list[float] = []
        monkeypatch.setattr(client, "ray", self)

    def init(self, **options: object) -> None:
        self.joined.append(options)
        self._raise(self.answers.get("init"))

    def get_actor(self, name: str, namespace: str) -> object:
        self._raise(self.answers.get("actor"))
        methods = {each: Method(answer, self.asked) for each, answer in self.answers.items()}
        return SimpleNamespace(**methods)

    def get(self, answer: object, timeout: float) -> object:
        self.patience.append(timeout)
        self._raise(answer)
        return answer

    def shutdown(self) -> None:
        self.left += 1

    def _raise(self, answer: object) -> None:
        if isinstance(answer, Exception):
            raise answer


@pytest.mark.parametrize(("address", "joins"), [(None, "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
@pytest.mark.parametrize("kind", ["done", "nothing"])
def test_an_order_is_carried_out_by_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None, joins: str, kind: str
) -> None:
    here = config(tmp_path, address=address)
    reached: list[str] = []
    monkeypatch.setattr(client, "_reach", reached.append)
    fake = FakeRay(monkeypatch, perform={"kind": kind, "text": "as asked"})
    assert client.perform(here, CLEAR) == "as asked"
    ((order, who),) = fake.asked
    assert order == {"action": "clear_quarantine", "card": "x"}
    assert str(who).startswith("command line ")
    assert [options["address"] for options in fake.joined] == [joins]
    assert reached == [joins for joins in [joins] if joins != "auto"]
    assert fake.left == 1
    # Longer than a machine that hangs keeps the coordinator (PING_SECONDS), and the journal too.
    assert fake.patience == [client.ORDER_SECONDS]
    assert client.ORDER_SECONDS >= client.ANSWER_SECONDS + 2 * PING_SECONDS


def test_what_is_only_looked_at_has_less_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch, status=GetTimeoutError("late"))
    with pytest.raises(ClusterError) as caught:
        client.ask(config(tmp_path), "status")
    assert str(caught.value) == "the coordinator doesn't answer within 10 s"
    assert fake.patience == [client.ANSWER_SECONDS]


@pytest.mark.parametrize(
    ("answers", "kind", "said"),
    [
        ({"init": ConnectionError("none")}, ClusterError, "no Ray cluster answers at auto"),
        ({"actor": ValueError("none")}, ClusterError, "is the operator up"),
        ({"perform": RayActorError()}, ClusterError, "doesn't answer"),
        ({"perform": GetTimeoutError("late")}, ClusterError, "doesn't answer within 30 s; whether"),
        ({"perform": GetTimeoutError("late")}, ClusterError, "not known: crynux-cluster audit"),
        ({"perform": {"kind": "refused", "text": "not now"}}, ClusterError, "not now"),
        ({"perform": {"kind": "unknown", "text": "no card x"}}, ConfigError, "no card x"),
    ],
)
def test_an_order_that_cant_be_carried_out_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: dict[str, object],
    kind: type[ClusterError],
    said: str,
) -> None:
    here = config(tmp_path)
    FakeRay(monkeypatch, **({"perform": {"text": "as asked"}} | answers))
    with pytest.raises(ClusterError, match=said) as caught:
        client.perform(here, CLEAR)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("configured", "written", "found"),
    [
        (None, "", "auto"),
        (None, "10.0.0.9:6379", "10.0.0.9:6379"),
        ("auto", "10.0.0.9:6379", "10.0.0.9:6379"),
        ("10.0.0.1:6379", "10.0.0.9:6379", "10.0.0.1:6379"),
    ],
)
def test_it_asks_the_cluster_that_the_coordinator_is_in(
    tmp_path: Path, configured: str | None, written: str, found: str
) -> None:
    here = config(tmp_path, address=configured)
    journal = SqlJournal(here.journal.url)
    lease = journal.acquire("me", Timestamp(0), 10.0)
    assert lease is not None
    journal.set_cursor(lease, RAY_ADDRESS, written)
    journal.close()
    assert client.address_of(here) == found


def test_who_asks_makes_no_journal_and_leaves_another_versions_as_it_is(tmp_path: Path) -> None:
    here = config(tmp_path)
    file = file_of(here.journal.url)
    assert file is not None
    assert client.address_of(here) == "auto"
    assert not file.parent.exists()
    file.parent.mkdir()
    file.touch()
    assert client.address_of(here) == "auto"
    assert file.stat().st_size == 0
    file.unlink()
    old_journals.make(here.journal.url)
    assert client.address_of(here) == "auto"
    with contextlib.closing(SqlJournal(here.journal.url, look_only=True)) as journal:
        assert journal.schema() == "3"


def test_a_cluster_that_is_gone_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_where: object, _timeout: float) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("actors.client.socket.create_connection", refuse)
    FakeRay(monkeypatch, perform={"text": "as asked"})
    with pytest.raises(ClusterError, match="nothing answers at") as caught:
        client.perform(config(tmp_path, address="10.0.0.1:6379"), CLEAR)
    assert "\n" not in str(caught.value)
