"""The store's actor without Ray: what it fetches, in which order, and what it says of it."""

from __future__ import annotations

import asyncio
import fcntl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from actors.keeping import LOST_SECONDS, MOST_LOST, TURN_SECONDS, StoreReport, StoreWorker
from cluster.models import diary
from cluster.models.assembly import open_keeper
from cluster.models.keeper import Keeper
from cluster.models.refs import ModelRef, of_model_id
from cluster.models.settings import StoreSettings
from cluster.models.sources import Denied
from tests.unit.actor_fakes import until
from tests.unit.model_fakes import Shelf, keeper, weights

FILE = "pytorch_lora_weights.safetensors"
A, B, C = ("lora:acme/a", "lora:acme/b", "lora:acme/c")


class House:
    """A worker on a shelf that waits for `go`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.go = threading.Event()
        self.go.set()
        self.shelf = Shelf({of_model_id(each): {FILE: weights()} for each in (A, B, C)})
        self.asked: list[ModelRef] = []
        listed = self.shelf.list

        def list_(ref: ModelRef) -> object:
            self.asked.append(ref)
            assert self.go.wait(30)
            return listed(ref)

        self.shelf.list = list_  # type: ignore[method-assign, assignment]
        self.keeper: Keeper | None = None

    def begin(self, *configured: str, again: float = 1000.0) -> StoreWorker:
        self.keeper = keeper(self.root, self.shelf)
        return StoreWorker(lambda: cast(Keeper, self.keeper), "1+abc", configured, again)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.go.set()


async def report_when(worker: StoreWorker, holds: Callable[[StoreReport], bool]) -> StoreReport:
    for _ in range(500):
        report = await worker.report()
        if holds(report):
            return report
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


async def test_what_is_configured_comes_first_and_by_itself(house: House) -> None:
    worker = house.begin(A, B)
    # What has come is there before it is counted.
    report = await report_when(worker, lambda r: sum(r.events.values()) == 2)
    assert report.here == {A, B}
    assert [str(ref) for ref in house.asked] == [A, B]
    assert (report.release, report.failed, report.queued, report.models) == ("1+abc", {}, 0, 2)
    assert report.used_bytes == 2 * len(weights())
    assert report.events == {("fetched", "hub"): 2}
    assert report.fetched_bytes == {"hub": 2 * len(weights())}


async def test_what_the_network_wants_queues_behind_and_once(house: House) -> None:
    house.go.clear()
    worker = house.begin(A)
    await until(lambda: bool(house.asked))
    await worker.want((B, B, C))
    await worker.want((B,))
    assert (await worker.report()).queued == 2
    house.go.set()
    await report_when(worker, lambda r: r.here == {A, B, C})
    assert [str(ref) for ref in house.asked] == [A, B, C]


async def test_what_takes_long_lets_others_go_first(house: House) -> None:
    """Whoever creates tasks may have the network ask for anything, of any size."""
    now = [0.0]
    house.go.clear()
    made = keeper(house.root, house.shelf)
    worker = StoreWorker(lambda: made, "1+abc", (), clock=lambda: now[0])
    await worker.want((A, B))
    await until(lambda: bool(house.asked))

    def opening() -> None:
        now[0] += 2 * TURN_SECONDS if house.shelf.sent == 0 else 0.0

    house.shelf.opening = opening
    house.go.set()
    report = await report_when(worker, lambda r: r.here == {A, B})
    assert [str(ref) for ref in house.asked] == [A, B, A]
    assert report.failed == {}


async def test_alone_it_takes_as_long_as_it_takes(house: House) -> None:
    now = [0.0]
    made = keeper(house.root, house.shelf)

    def opening() -> None:
        now[0] += 2 * TURN_SECONDS

    house.shelf.opening = opening
    worker = StoreWorker(lambda: made, "1+abc", (A,), clock=lambda: now[0])
    await report_when(worker, lambda r: r.here == {A})
    assert [str(ref) for ref in house.asked] == [A]


async def test_a_download_that_hangs_keeps_nobody_waiting(house: House) -> None:
    """Wherever: its thread is left to it, and it has another turn when it comes back."""
    now = [0.0]
    made = keeper(house.root, house.shelf)
    back = threading.Event()

    def hang() -> None:
        if house.shelf.listed == 1:
            assert back.wait(30)

    house.shelf.listing = hang
    worker = StoreWorker(lambda: made, "1+abc", (A, B), clock=lambda: now[0])
    await until(lambda: bool(house.asked))
    now[0] += LOST_SECONDS + 1
    try:
        report = await report_when(worker, lambda r: B in r.here)
        assert "no sign of life" in report.failed[A]
        await worker.want((A,))
        assert (await worker.report()).queued == 0
    finally:
        back.set()
    await until(lambda: not worker._lost)
    await worker.want((A,))
    report = await report_when(worker, lambda r: r.here == {A, B})
    assert report.failed == {}


async def test_no_more_threads_are_left_than_some(house: House) -> None:
    now = [0.0]
    house.go.clear()
    made = keeper(house.root, house.shelf)
    ids = tuple(f"lora:acme/{n}" for n in range(MOST_LOST + 2))
    worker = StoreWorker(lambda: made, "1+abc", ids, clock=lambda: now[0])
    for number in range(MOST_LOST + 1):
        await until(lambda n=number: len(house.asked) == n + 1)  # type: ignore[misc]
        now[0] += LOST_SECONDS + 1
    await asyncio.sleep(1.0)
    assert len(worker._lost) == MOST_LOST
    assert len(house.asked) == MOST_LOST + 1


async def test_a_store_that_cannot_be_made_is_told_and_mended(house: House) -> None:
    in_the_way = house.root / "data"
    in_the_way.write_text("no folder")
    root = in_the_way / "models"

    def make() -> Keeper:
        opened = open_keeper(StoreSettings(root, ("web",)))
        return opened if opened.trouble else keeper(root, house.shelf)

    worker = StoreWorker(make, "1+abc", (A,), again_seconds=0.05)
    report = await report_when(worker, lambda r: bool(r.failed))
    assert (report.room_bytes, report.models, report.here) == (0, 0, frozenset())
    assert "can't be written: Not a directory" in report.trouble
    assert report.trouble in report.failed[A]
    in_the_way.unlink()
    report = await report_when(worker, lambda r: r.here == {A})
    assert (report.trouble, report.failed) == ("", {})
    assert report.room_bytes is not None and report.room_bytes > 0


async def test_what_cannot_be_had_is_named_with_the_reason(house: House) -> None:
    house.shelf.listing = lambda: (_ for _ in ()).throw(Denied("401"))
    worker = house.begin(A)
    await worker.want(("nonsense", "base:../x", B))
    report = await report_when(worker, lambda r: len(r.failed) == 4)
    assert report.here == frozenset()
    assert report.failed[A] == "401"
    assert "not a model's id" in report.failed["nonsense"]


async def test_what_is_no_models_id_is_told_and_counted(house: House) -> None:
    worker = house.begin()
    await worker.want(("nonsense", "base:../../etc", "lora:https://host/\x1b[31m"))
    # The diary may be read before the last of them is in it.
    report = await report_when(worker, lambda r: sum(r.events.values()) == len(r.failed) == 3)
    assert report.events == {("refused", "name"): 2, ("refused", "url"): 1}


async def test_what_was_told_before_the_diary_began_anew_counts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "MOST", 300)
    worker = house.begin()
    assert house.keeper is not None
    counted = 0
    for number in range(20):
        for _ in range(number % 4):
            house.keeper.diary.write("refused", "x", rule="name", reason="y" * 50)
            counted += 1
        report = await worker.report()
    assert report.events == {("refused", "name"): counted}


def test_of_two_that_begin_the_diary_anew_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diary, "MOST", 100)
    made = diary.Diary(tmp_path / "diary.jsonl")
    made.write("failed", "first", reason="x" * 200)
    flock = fcntl.flock

    def after_another(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        made.write("failed", "second")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_another)
    made.write("failed", "third")
    assert "first" in (tmp_path / "diary.old").read_text()
    assert [entry["model"] for entry, _ in made.read()] == ["second", "third"]


async def test_what_strangers_write_is_shown_in_short_and_plain(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = house.begin()
    link = "lora:https://host.example/x?token=SECRET"
    await worker.want(("x" * 10_000, "lora:https://host/\n\x1b[31m\ud800", link))
    report = await report_when(worker, lambda r: len(r.failed) == 3)
    assert all(len(key) < 300 and key.isascii() and key.isprintable() for key in report.failed)
    said = capsys.readouterr().out
    assert "not_fetched" in said
    assert "SECRET" not in said
    assert "\x1b[31m" not in said.replace("\x1b[0m", "").split("host/")[1][:20]


async def test_a_configured_model_is_tried_again(house: House) -> None:
    def refuse() -> None:
        if house.shelf.listed < 3:
            raise Denied("401")

    house.shelf.listing = refuse
    worker = house.begin(A, again=0.02)
    report = await report_when(worker, lambda r: r.here == {A})
    assert report.failed == {}


@pytest.mark.parametrize("asked", [(), (B,), (B, C)])
async def test_a_configured_model_is_tried_again_however_busy_the_network_is(
    house: House, asked: tuple[str, ...]
) -> None:
    def refuse() -> None:
        if house.asked[-1] == of_model_id(A) and house.asked.count(of_model_id(A)) < 3:
            raise Denied("401")

    house.shelf.listing = refuse
    worker = house.begin(A, again=0.3)
    for _ in range(1000):
        await worker.want(asked)
        await asyncio.sleep(0.01)
        if A in (await worker.report()).here:
            return
    raise AssertionError(house.asked)


async def test_what_was_evicted_is_here_no_more(house: House) -> None:
    worker = house.begin(A)
    await report_when(worker, lambda r: r.here == {A})
    assert house.keeper is not None
    house.keeper.disk.remove(of_model_id(A).key)
    assert (await worker.report()).here == frozenset()
    await worker.want((A,))
    await report_when(worker, lambda r: r.here == {A})


async def test_what_is_dropped_is_gone_unless_it_is_needed(house: House) -> None:
    worker = house.begin(A)
    await worker.want((B,))
    await report_when(worker, lambda r: r.here == {A, B})
    assert house.keeper is not None
    disk = house.keeper.disk
    with disk.try_lock(f"{of_model_id(B).key}.use") as free:
        assert free
        assert await worker.drop(B) == "a task uses it"
    assert await worker.drop(B) == "dropped"
    assert (await worker.report()).here == {A}
    assert disk.manifest(of_model_id(B).key) is None
    assert await worker.drop(B) == "not among what was fetched there"
    house.keeper.pinned = frozenset({of_model_id(A)})
    assert "configured to stay" in await worker.drop(A)


async def test_a_download_that_runs_is_seen(house: House) -> None:
    worker = house.begin()
    gate = threading.Event()

    def opening() -> None:
        assert gate.wait(30)

    house.shelf.opening = opening
    await worker.want((A,))
    try:
        report = await report_when(worker, lambda r: bool(r.downloads))
        (download,) = report.downloads
        assert (str(download.ref), download.source, download.background) == (A, "hub", True)
        assert download.total == len(weights())
    finally:
        gate.set()
    await report_when(worker, lambda r: r.here == {A})
