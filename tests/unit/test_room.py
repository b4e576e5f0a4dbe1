"""Bytes that are there, that were promised, and that leave."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from cluster.models.disk import Progress
from cluster.models.keeper import Keeper, Wanted
from cluster.models.refs import ModelRef, ref
from cluster.models.refusals import Refused, Rule
from cluster.models.settings import Limits
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


def leftovers(store: Keeper, key: str) -> Path:
    folder = store.disk.partial(key)
    folder.mkdir()
    (folder / "x.part").write_bytes(b"x")
    return folder


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


def test_a_removed_model_is_gone_at_once_and_its_name_free(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    store.ensure(A, NOBODY)
    shutil.copytree(store.disk.model(A.key), store.disk.model("copy"))
    store.disk.remove(A.key)
    store.disk.remove(A.key)
    assert not store.disk.model(A.key).exists()
    store.ensure(A, NOBODY)
    assert A in here(store)
