"""One store, many processes: they share downloads, die in the middle, and are in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.core.errors import ModelUnavailable, ModelUnavailableKind
from cluster.models.guarded_http import guarded_client
from cluster.models.hub import Hub as HubSource
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused
from cluster.models.settings import Limits
from cluster.models.store import ModelStore
from cluster.models.urls import UrlRules
from devnet.hub import Hub
from tests.unit.model_fakes import content_of, weights

RULES = UrlRules(
    ports=frozenset({80, 443, *range(1024, 2**16)}),
    allow_hosts=frozenset({"127.0.0.1", "localhost"}),
)
FILE = "pytorch_lora_weights.safetensors"
SIZE = 3_000_000
LARGE = weights(SIZE)
PATIENCE = 60.0
A, B = ref("lora", "acme/a"), ref("lora", "acme/b")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        for name in ("acme/a", "acme/b"):
            server.add(name, {FILE: LARGE})
        yield server


def keeper(root: Path, url: str) -> Keeper:
    limits = Limits(spare=0, part=256 * 1024, connections=2)
    made = Keeper(ModelStore(root), [HubSource(lambda: guarded_client(RULES), url)], limits)
    made.room.tidy()
    return made


def fetch(root: str, url: str, name: str, background: str = "") -> None:
    """What each process does; it says so when it has the model."""
    store = keeper(Path(root), url)
    store.ensure(ref("lora", name), Wanted(background=bool(background)))
    print(len(store.store.lora_file(name).read_bytes()))


def start(root: Path, hub: Hub, asked: ModelRef, background: bool = False) -> subprocess.Popen[str]:
    program = f"from {__name__} import fetch; fetch(*__import__('sys').argv[1:])"
    flags = ["x"] if background else []
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(root), hub.url, asked.name, *flags],
        stdout=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def succeeded(process: subprocess.Popen[str]) -> bool:
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode == 0 and int(out) == len(LARGE)


def test_ten_processes_make_one_download(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 2e6
    processes = [start(tmp_path, hub, A) for _ in range(10)]
    assert all([succeeded(process) for process in processes])
    assert hub.sent("cdn/") == len(LARGE)
    assert len(hub.requests("api/models")) == 1


@pytest.mark.parametrize("when", [0, 300_000, 1_500_000])
def test_killed_in_the_middle_and_gone_on_with(hub: Hub, tmp_path: Path, when: int) -> None:
    hub.bytes_per_second = 1e6
    store = keeper(tmp_path, hub.url)
    first = start(tmp_path, hub, A)
    until(lambda: any(p.done > when for p in store.disk.downloads()))
    os.kill(first.pid, signal.SIGKILL)
    first.wait(PATIENCE)
    first.communicate()
    with pytest.raises(ModelUnavailable):
        store.store.lora_file(A.name)
    assert store.disk.manifests() == {}
    assert store.disk.downloads() == (), "nobody fetches it any more"
    hub.bytes_per_second = None
    store.ensure(A, Wanted())
    assert content_of(store, A) == {FILE: LARGE}
    # Parts that were whole are not fetched again: only those that were under way.
    assert hub.sent("cdn/") <= len(LARGE) + 3 * 256 * 1024


def test_who_waits_takes_over_from_one_that_is_killed(hub: Hub, tmp_path: Path) -> None:
    # However long a process takes to begin, the first isn't done by then.
    hub.bytes_per_second = 5e4
    store = keeper(tmp_path, hub.url)
    first = start(tmp_path, hub, A)
    until(lambda: any(p.done > 0 for p in store.disk.downloads()))
    second = start(tmp_path, hub, A)
    until(lambda: store.disk.is_locked(f"{A.key}.wait"))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    hub.bytes_per_second = 1e6
    assert succeeded(second)


def test_the_background_stands_back_while_a_task_waits_for_another_model(
    hub: Hub, tmp_path: Path
) -> None:
    hub.bytes_per_second = 5e4
    store = keeper(tmp_path, hub.url)
    behind = start(tmp_path, hub, A, background=True)
    until(lambda: any(p.done > 0 for p in store.disk.downloads()))
    ahead = start(tmp_path, hub, B)
    # However long a process takes to begin.
    until(lambda: any(p.ref == B for p in store.disk.downloads()))
    hub.bytes_per_second = 1e6
    assert succeeded(ahead)
    # The other was begun first, and is done after it all the same.
    assert behind.poll() is None
    assert store.disk.manifest(A.key) is None
    assert succeeded(behind)


def test_a_model_in_use_by_another_process_is_not_evicted(hub: Hub, tmp_path: Path) -> None:
    program = (
        f"import sys; from {__name__} import keeper, A; from cluster.models.keeper import Wanted; "
        "from pathlib import Path; store = keeper(Path(sys.argv[1]), sys.argv[2])\n"
        "with store.held((A,), Wanted()):\n print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), hub.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    store = keeper(tmp_path, hub.url)
    small = Keeper(store.store, store.sources, Limits(quota=int(len(LARGE) * 1.5), spare=0))
    with pytest.raises(ModelUnavailable, match="quota_gb"):
        small.ensure(B, Wanted())
    assert store.disk.manifest(A.key) is not None
    holder.communicate("")
    small.ensure(B, Wanted())
    assert store.disk.manifest(A.key) is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(hub: Hub, small_disk: Path) -> None:
    store = keeper(small_disk, hub.url)
    blocker = small_disk / "blocker"
    blocker.write_bytes(bytes(2_000_000))
    with pytest.raises(Refused, match="quota_gb"):
        store.ensure(A, Wanted())
    assert hub.sent("cdn/") == 0, "it is known before a byte is asked for"
    blocker.unlink()

    def fill() -> None:
        """Somebody else takes the space while the model is on its way."""
        under_way = any(store.disk.partial(A.key).rglob("*.part"))
        if under_way and not blocker.exists():
            blocker.write_bytes(bytes(3_000_000))

    with pytest.raises(ModelUnavailable) as caught:
        store.ensure(A, Wanted(alive=fill))
    assert caught.value.kind is ModelUnavailableKind.UNREACHABLE
    assert "No space left" in str(caught.value)
    assert store.disk.manifests() == {}
    blocker.unlink()
    store.ensure(A, Wanted())
    assert content_of(store, A) == {FILE: LARGE}
    # The first is worth no less than the second, which doesn't fit beside it.
    store.ensure(B, Wanted())
    assert set(store.disk.manifests()) == {B.key}
