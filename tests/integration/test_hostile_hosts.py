"""Links whose hosts would keep whoever asks them for as long as he lets himself be kept.

Each host goes on for a minute, or until nobody listens; none may be listened to for so long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    ModelUnavailable,
    ModelUnavailableKind,
)
from cluster.models.guarded_http import guarded_client
from cluster.models.hearing import Patience
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ref
from cluster.models.settings import Limits
from cluster.models.store import ModelStore
from cluster.models.urls import UrlRules
from cluster.models.web import Web
from devnet.faulty_http import Fault, FileServer
from tests.integration.hostile_host import HostileHost
from tests.unit.model_fakes import weights

Say = Callable[[bytes], bool]
LARGE = weights(300_000)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Disposition: attachment; filename=a.safetensors\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
SHORT = Patience(head=0.5, body=0.5)
LONG = Patience(head=3600.0, body=3600.0)


def dripped_head(host: HostileHost, say: Say) -> None:
    say(b"HTTP/1.1 200 OK\r\nX: ")
    host.drip(say, b"a")


def early_hints(host: HostileHost, say: Say) -> None:
    host.drip(say, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")


def slow_redirects(host: HostileHost, say: Say) -> None:
    host.closing.wait(0.3)
    say(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n")


def chunk_extension(host: HostileHost, say: Say) -> None:
    say(CHUNKED + b"5;x=")
    host.drip(say, b"a")


def dripped_trailer(host: HostileHost, say: Say) -> None:
    say(CHUNKED + b"%x\r\n%s\r\n0\r\nX: " % (len(LARGE), LARGE))
    host.drip(say, b"a")


TALKS = [dripped_head, early_hints, slow_redirects, chunk_extension, dripped_trailer]


class Stalling(FileServer):
    """Stalls after the first byte, until it is closed."""

    ended = False

    def __init__(self) -> None:
        super().__init__({"x": LARGE})
        headers = {"Content-Disposition": "attachment; filename=a.safetensors"}
        self.fail("x", Fault(stall=1, headers=headers), times=99)


@pytest.fixture(params=[*TALKS, None], ids=lambda talk: talk.__name__ if talk else "stall")
def host(request: pytest.FixtureRequest) -> Iterator[HostileHost | Stalling]:
    made = Stalling() if request.param is None else HostileHost(request.param)
    with made as host:
        yield host


def ends_with(
    host: HostileHost | Stalling, root: Path, wanted: Wanted, patience: Patience = LONG
) -> ClusterError:
    """How it ends, before the host does."""
    rules = UrlRules(allow_hosts=frozenset({f"127.0.0.1:{host.port}"}))
    client = guarded_client(rules, patience=patience, max_redirects=200)
    limits = Limits(spare=0, rounds=1, part=64 * 1024)
    keeper = Keeper(ModelStore(root), [Web(client, rules)], limits)
    with client, pytest.raises(ClusterError) as caught:
        keeper.ensure(ref("lora", f"{host.url}/x"), wanted)
    assert not host.ended
    return caught.value


def test_the_background_gives_it_up(host: HostileHost | Stalling, tmp_path: Path) -> None:
    error = ends_with(host, tmp_path, Wanted(background=True), SHORT)
    assert isinstance(error, ModelUnavailable)
    assert error.kind is ModelUnavailableKind.UNREACHABLE


def test_the_deadline_is_kept(host: HostileHost | Stalling, tmp_path: Path) -> None:
    wanted = Wanted(deadline=time.time() + 1.0)
    assert isinstance(ends_with(host, tmp_path, wanted), DeadlinePassed)


def test_a_cancel_is_heard(host: HostileHost | Stalling, tmp_path: Path) -> None:
    """And whoever waits is known to live until then."""
    alive: list[float] = []
    enough = threading.Event()

    def lives() -> None:
        alive.append(time.monotonic())
        if len(alive) > 5:
            enough.set()

    wanted = Wanted(cancelled=enough.is_set, alive=lives)
    assert isinstance(ends_with(host, tmp_path, wanted), Cancelled)
