"""Bytes that are there, that were promised, and that leave."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from rich.console import Console

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    ConfigError,
    DeadlinePassed,
    ModelUnavailable,
)
from cluster.models.disk import Progress
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import Limits, StoreSettings
from cluster.models_cli import drop, rows
from tests.unit.model_fakes import Shelf, Time, keeper, weights

NOBODY = Wanted()
FILE = "pytorch_lora_weights.safetensors"
SIZE = len(weights(1000))
A, B, C, D = (ref("lora", f"acme/{letter}") for letter in "abcd")


def small(
    tmp_path: Path,
    models: float,
    pinned: frozenset[ModelRef] = frozenset(),
    time: Time | None = None,
) -> Keeper:
    """Room for so many models of `SIZE`."""
    shelf = Shelf({each: {FILE: weights(1000)} for each in (A, B, C, D)})
    limits = Limits(quota=int(SIZE * models), spare=0, rounds=1)
    return keeper(tmp_path, shelf, limits=limits, pinned=pinned, time=time)


def here(store: Keeper) -> set[ModelRef]:
    return {manifest.ref for manifest in store.disk.manifests().values()}


def test_the_least_needed_leaves(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    for each in (A, A, A, B, C):
        store.ensure(each, NOBODY)
    assert here(store) == {A, C}
    assert [e["model"] for e, _ in store.diary.read() if e["event"] == "evicted"] == [str(B)]


def test_what_is_left_is_what_may_yet_come(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    whole = int(SIZE * 2.5)
    assert store.room.left() == whole
    store.ensure(A, NOBODY)
    store.ensure(B, NOBODY)
    taken = sum(manifest.size for manifest in store.disk.manifests().values())
    assert store.room.left() == whole - taken > 0


def test_need_fades(tmp_path: Path) -> None:
    time = Time()
    store = small(tmp_path, 2.5, time=time)
    for each in (A, A, A):
        store.ensure(each, NOBODY)
    time.now += 60 * 86400
    for each in (B, C):
        store.ensure(each, NOBODY)
    assert here(store) == {B, C}


def test_the_pinned_stay(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5, pinned=frozenset({A}))
    for each in (A, B, B, B, C):
        store.ensure(each, NOBODY)
    assert here(store) == {A, C}


def test_what_the_network_asks_for_displaces_nothing_that_tasks_need(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    store.ensure(A, NOBODY)
    store.ensure(B, Wanted(background=True))
    store.ensure(C, Wanted(background=True))
    assert here(store) == {A, C}, "the one that no task has needed made room"
    store.ensure(C, NOBODY)
    with pytest.raises(Refused) as caught:
        store.ensure(D, Wanted(background=True))
    assert caught.value.rule is Rule.QUOTA
    assert here(store) == {A, C}
    store.ensure(D, NOBODY)
    assert D in here(store), "a task's may"


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    with store.held((A,), NOBODY):
        for each in (B, B, B, C):
            store.ensure(each, NOBODY)
        assert here(store) == {A, C}


def test_when_nothing_may_leave_the_newcomer_is_refused(tmp_path: Path) -> None:
    store = small(tmp_path, 1.5, pinned=frozenset({A}))
    store.ensure(A, NOBODY)
    with pytest.raises(Refused, match="quota_gb") as caught:
        store.ensure(B, NOBODY)
    assert caught.value.rule is Rule.QUOTA
    assert here(store) == {A}


def test_what_is_too_large_for_the_quota_sends_nobody_away_in_vain(tmp_path: Path) -> None:
    store = small(tmp_path, 0.5)
    with pytest.raises(Refused):
        store.ensure(A, NOBODY)
    assert here(store) == set()


def test_what_others_were_promised_is_taken(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    store.disk.tell(A.key, Progress(A, "hub", 0, 2 * SIZE, 0.0, 0.0, background=False))
    with store.disk.try_lock(A.key) as got:
        assert got
        with pytest.raises(Refused):
            store.ensure(B, NOBODY)
    store.ensure(B, NOBODY)
    assert here(store) == {B}, "and is free again when its download has died"


def test_the_disks_own_end_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    store = small(tmp_path, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, SIZE // 2))
    with pytest.raises(Refused) as caught:
        store.ensure(A, NOBODY)
    assert caught.value.rule is Rule.QUOTA


def test_anothers_download_that_ends_meanwhile_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small(tmp_path, 2.5)
    (store.disk.partial(B.key) / "unet").mkdir(parents=True)
    store.disk.tell(B.key, Progress(B, "hub", 0, 1, 0.0, 0.0, background=False))
    scandir = os.scandir

    def published(path: str) -> object:
        if str(path) == str(store.disk.partial(B.key) / "unet"):
            shutil.rmtree(store.disk.partial(B.key))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", published)
    with store.disk.try_lock(B.key):
        store.ensure(A, NOBODY)
    assert here(store) == {A}


def leftovers(store: Keeper, key: str, size: int = 1, at: float | None = None) -> Path:
    folder = store.disk.partial(key)
    folder.mkdir()
    (folder / "x.part").write_bytes(bytes(size))
    if at is not None:
        os.utime(folder, (at, at))
    return folder


def test_what_broken_downloads_left_is_taken_too(tmp_path: Path) -> None:
    store = small(tmp_path, 2.5)
    whole = store.room.left()
    for number in range(6):
        asked = ref("lora", f"acme/broken{number}")
        store.room.make(SIZE, asked)
        leftovers(store, asked.key, SIZE, at=number)
        assert on_disk(store.disk.base / "partial") <= whole
    assert store.room.leftover() == 2 * SIZE
    assert store.room.left() == whole - 2 * SIZE


def test_of_what_was_left_the_oldest_goes_first_and_no_more_than_must(tmp_path: Path) -> None:
    store = small(tmp_path, 4)
    store.ensure(A, NOBODY)
    names = [ref("lora", f"acme/broken{number}").key for number in range(3)]
    newest, oldest, middle = (
        leftovers(store, key, SIZE, at) for key, at in zip(names, (3, 1, 2), strict=True)
    )
    store.ensure(B, NOBODY)
    assert (oldest.exists(), middle.exists(), newest.exists()) == (False, True, True)
    assert here(store) == {A, B}


def test_what_is_left_of_the_model_itself_is_gone_on_with(tmp_path: Path) -> None:
    store = small(tmp_path, 1.2)
    mine = leftovers(store, A.key, SIZE)
    store.room.make(SIZE, A)
    assert mine.exists()
    store.ensure(A, NOBODY)
    assert here(store) == {A}


def test_what_is_still_being_tried_leaves_no_room_to_others(tmp_path: Path) -> None:
    store = small(tmp_path, 1.5)
    leftovers(store, B.key, SIZE)
    with store.disk.try_lock(B.key), pytest.raises(Refused) as caught:
        store.ensure(A, NOBODY)
    assert caught.value.rule is Rule.QUOTA
    store.ensure(A, NOBODY)


def test_leftovers_of_the_dead_go_when_room_is_short(tmp_path: Path) -> None:
    store = small(tmp_path, 1.5)
    store.ensure(A, NOBODY)
    dead, living = leftovers(store, B.key), leftovers(store, C.key)
    with store.disk.try_lock(C.key):
        store.ensure(D, NOBODY)
    assert not dead.exists()
    assert living.exists()


def test_old_leftovers_go_at_the_next_start(tmp_path: Path) -> None:
    time = Time()
    store = small(tmp_path, 3, time=time)
    new, old = leftovers(store, A.key), leftovers(store, B.key)
    os.utime(new, (time.now, time.now))
    os.utime(old, (time.now - 2 * 86400, time.now - 2 * 86400))
    (tmp_path / ".store" / "trash" / "x").mkdir()
    store.room.tidy()
    assert new.exists()
    assert not old.exists()
    assert not list((tmp_path / ".store" / "trash").iterdir())


@pytest.mark.parametrize("cut", [[], [400_000]], ids=["at once", "taken up again"])
def test_a_file_of_unknown_size_is_held_to_the_quota_as_it_comes(
    tmp_path: Path, cut: list[int]
) -> None:
    shelf = Shelf({A: {FILE: weights(3_000_000)}}, sizes=False, hashes=False, cut=cut)
    store = keeper(tmp_path, shelf, limits=Limits(quota=1_000_000, spare=0, rounds=3))
    with pytest.raises(Refused) as caught:
        store.ensure(A, NOBODY)
    assert caught.value.rule in {Rule.QUOTA, Rule.HEADER}
    assert shelf.sent < 1_500_000
    fits = keeper(tmp_path, shelf, limits=Limits(quota=4_000_000, spare=0, rounds=3))
    fits.ensure(A, NOBODY)
    assert here(fits) == {A}


def archive(size: int) -> bytes:
    """A zip that unpacks to so many bytes, and has far fewer."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        weights = len(header).to_bytes(8, "little") + header + bytes(size)
        packed.writestr(FILE, weights)
    return file.getvalue()


def packed(tmp_path: Path, size: int, quota: int, time: Time) -> tuple[Keeper, Shelf]:
    shelf = Shelf({A: {"archive": archive(size)}}, archive=True)
    limits = Limits(quota=quota, spare=0, rounds=1)
    return keeper(tmp_path, shelf, limits=limits, time=time), shelf


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Looks:
    """Asked whether the model is still wanted: while it unpacks, a second goes by at each look."""

    def __init__(self, store: Keeper, shelf: Shelf, time: Time) -> None:
        self.store, self.time = store, time
        self.packed = len(shelf.files[A]["archive"])
        self.bytes: list[int] = []
        self.told: list[int] = []
        self.enough = False

    def __call__(self) -> bool:
        self.bytes.append(on_disk(self.store.disk.base / "partial"))
        self.time.now += self.bytes[-1] > 2 * self.packed
        self.told += [max(each.done, each.total) for each in self.store.disk.downloads()]
        return self.enough and self.bytes[-1] > 1_000_000


def test_what_an_archive_unpacks_to_is_held_to_the_quota(tmp_path: Path) -> None:
    time = Time()
    store, shelf = packed(tmp_path, 20_000_000, 1_000_000, time)
    looks = Looks(store, shelf, time)
    with pytest.raises(Refused) as caught:
        store.ensure(A, Wanted(cancelled=looks))
    assert caught.value.rule is Rule.QUOTA
    assert here(store) == set()
    assert 500_000 < max(looks.bytes) <= 1_000_000
    store, _ = packed(tmp_path, 500_000, 1_000_000, time)
    store.ensure(A, NOBODY)
    assert here(store) == {A}


def test_while_it_unpacks_others_know_what_it_takes(tmp_path: Path) -> None:
    time = Time()
    store, shelf = packed(tmp_path, 5_000_000, 8_000_000, time)
    looks = Looks(store, shelf, time)
    store.ensure(A, Wanted(cancelled=looks))
    assert 4_000_000 < max(looks.told) < 6_000_000


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_unpacking_ends_when_nobody_wants_it_any_more(tmp_path: Path, how: str) -> None:
    time = Time()
    store, shelf = packed(tmp_path, 20_000_000, 10**9, time)
    looks = Looks(store, shelf, time)
    looks.enough = how == "cancelled"
    deadline = None if looks.enough else time.now + 10
    with pytest.raises((Cancelled, DeadlinePassed)):
        store.ensure(A, Wanted(deadline, looks))
    assert here(store) == set()
    assert 1_000_000 < max(looks.bytes) < 15_000_000
    sent = shelf.sent
    store.ensure(A, NOBODY)
    assert shelf.sent == sent, "the archive itself had come"


def test_folders_that_lost_their_manifest_go_at_the_next_start(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    for each in (A, B):
        store.ensure(each, NOBODY)
    for each in (B, C):
        store.disk.model(each.key).mkdir(exist_ok=True)
        (store.disk.model(each.key) / ".manifest.json").write_text("")
    with store.disk.try_lock(C.key):
        store.room.tidy()
    assert store.disk.keys() == tuple(sorted((A.key, C.key))), "another process has the lock"
    store.room.tidy()
    assert store.disk.keys() == (A.key,)


def test_a_start_beside_others_leaves_them_where_to_put_what_leaves(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    trash = tmp_path / ".store" / "trash"
    inode = trash.stat().st_ino
    (trash / "old" / "x").mkdir(parents=True)
    store.room.tidy()
    assert trash.stat().st_ino == inode
    assert list(trash.iterdir()) == []
    shutil.rmtree(trash)
    store.disk.remove(A.key)
    assert not store.disk.model(A.key).exists()


def test_a_start_takes_nothing_from_under_who_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    rename = Path.rename

    def after_a_start(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        store.room.tidy()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", after_a_start)
    store.disk.remove(A.key)
    assert not store.disk.model(A.key).exists()
    assert list((store.disk.base / "trash").iterdir()) == []


def test_a_start_takes_nothing_from_under_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    store = small(tmp_path, 3, time=time)
    replace = Path.replace

    def after_a_start(path: Path, target: Path) -> Path:
        os.utime(path, (time.now, time.now))
        store.room.tidy()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", after_a_start)
    store.disk.used(A.key, time.now)
    store.disk.note_refusal(A.key, "header", "x", time.now + 60)
    store.disk.tell(A.key, Progress(A, "hub", 0, 1, 0.0, 0.0, background=False))
    assert small_files(store) == {
        f"uses/{A.key}", f"refused/{A.key}", f"progress/{A.key}"
    }  # fmt: skip


def test_what_a_dead_one_was_writing_goes_at_a_later_start(tmp_path: Path) -> None:
    time = Time()
    store = small(tmp_path, 3, time=time)
    half = store.disk.base / "uses" / f"{A.key}.1.2~"
    half.write_text("[")
    os.utime(half, (time.now, time.now))
    store.room.tidy()
    assert half.exists()
    time.now += 61
    store.room.tidy()
    assert not half.exists()


def small_files(store: Keeper) -> set[str]:
    kinds = ("locks", "uses", "refused", "progress")
    found = {f"{kind}/{path.name}" for kind in kinds for path in (store.disk.base / kind).iterdir()}
    return {name for name in found if "/." not in name}


def test_small_files_of_what_is_not_here_go_at_a_later_start(tmp_path: Path) -> None:
    """Whoever creates tasks may name any number of models."""
    time = Time()
    store = small(tmp_path, 3, time=time)
    store.ensure(A, NOBODY)
    absent = ref("lora", "acme/absent")
    with pytest.raises(ModelUnavailable), store.held((absent,), Wanted(deadline=time.now + 9)):
        pass
    store.disk.used(B.key, time.now)
    store.disk.note_refusal(C.key, "header", "x", time.now + 60)
    store.disk.tell(D.key, Progress(D, "hub", 0, 1, 0.0, 0.0, background=False))
    assert {key.partition("/")[0] for key in small_files(store)} == {
        "locks", "uses", "refused", "progress"
    }  # fmt: skip
    with store.disk.try_lock(f"{B.key}.use"):
        store.room.tidy()
        assert f"locks/{B.key}.use" in small_files(store)
        assert f"refused/{C.key}" in small_files(store)
    time.now += 365 * 86400
    store.room.tidy()
    assert small_files(store) == {f"uses/{A.key}"}


def test_a_lock_is_one_though_its_file_is_removed_meanwhile(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    disk, opened = store.disk, os.open
    file = disk.base / "locks" / "x"
    file.write_text("")

    def removed(path: str, *rest: int) -> int:
        descriptor = opened(path, *rest)
        if str(path) == str(file) and not list(tmp_path.glob("done")):
            (tmp_path / "done").write_text("")
            file.unlink()
        return descriptor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", removed)
        with disk.try_lock("x") as first, disk.try_lock("x") as second:
            assert (first, second) == (True, False)


def test_looking_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models list`, run by somebody else than the service."""
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    opened = os.open

    def reading_only(path: str, flags: int, *rest: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError
        return opened(path, flags, *rest)

    with store.held((A,), NOBODY):
        monkeypatch.setattr(os, "open", reading_only)
        (row,) = rows(StoreSettings(tmp_path, ("hub",)))
        assert row.in_use
        with store.disk.try_lock(f"{A.key}.use") as free:
            assert not free, "another user's file is locked as well"


def test_what_is_dropped_by_command_is_neither_pinned_nor_used(tmp_path: Path) -> None:
    store = small(tmp_path, 3, pinned=frozenset({A}))
    settings = StoreSettings(tmp_path, ("hub",), pinned=store.pinned)
    for each in (A, B):
        store.ensure(each, NOBODY)
    quiet = Console(quiet=True)
    with pytest.raises(ConfigError, match="configured to stay"):
        drop(settings, [str(A)], quiet)
    with store.disk.try_lock(f"{B.key}.use"), pytest.raises(ClusterError, match="uses it"):
        drop(settings, [str(B)], quiet)
    assert here(store) == {A, B}
    drop(settings, [str(B)], quiet)
    assert here(store) == {A}
    with pytest.raises(ConfigError, match="not among"):
        drop(settings, [str(B)], quiet)


def test_a_model_that_lost_its_manifest_can_be_dropped(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    (store.disk.model(A.key) / ".manifest.json").write_text("")
    assert store.drop(A) is None
    assert store.disk.keys() == ()


def test_a_removed_model_is_gone_at_once_and_its_name_free(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    shutil.copytree(store.disk.model(A.key), store.disk.model("copy"))
    store.disk.remove(A.key)
    store.disk.remove(A.key)
    assert not store.disk.model(A.key).exists()
    store.ensure(A, NOBODY)
    assert A in here(store)
