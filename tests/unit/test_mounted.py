"""What an engine asks of its machine's store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cluster.core.errors import Cancelled
from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import AttemptId, CardUuid, Commitment, TaskType
from cluster.inference.engine import Engine
from cluster.inference.mounted import PRELOAD_PAUSE, MountedEngine
from cluster.models.keeper import Keeper
from cluster.models.refusals import Refused
from tests.unit.actor_fakes import DONE
from tests.unit.model_fakes import keeper, lora_shelf


def test_a_refused_name_of_a_tasks_model_is_told(tmp_path: Path) -> None:
    store = keeper(tmp_path, lora_shelf())
    mounted = MountedEngine(cast("Engine", None), CardUuid("GPU-1"), store)
    task = {"base_model": {"name": "acme/x"}, "prompt": "a cat", "task_config": {}}
    task["lora"] = {"model": "acme/.hidden"}
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(task), None)
    with pytest.raises(Refused):
        mounted.run(order, lambda: False, lambda _step, _steps: None)
    ((entry, _),) = store.diary.read()
    assert (entry["event"], entry["rule"], entry["model"]) == ("refused", "name", "task 0x01")


class Store:
    """Has what is asked for, or has to bring it first."""

    def __init__(self, *brings: bool) -> None:
        self.brings = list(brings)

    def telling(self, _what: str) -> nullcontext[None]:
        return nullcontext()

    @contextmanager
    def held(self, _refs: object, _wanted: object) -> Iterator[bool]:
        yield self.brings.pop(0)


class Computing:
    def run(self, *_: object) -> Computed:
        return DONE

    def prefetch(self, *_: object) -> None: ...

    def usage(self) -> CardUse:
        return CardUse(loads=7)


def test_what_a_task_finds_on_the_disk_is_counted() -> None:
    store = cast(Keeper, Store(True, False, False, False))
    mounted = MountedEngine(cast("Engine", Computing()), CardUuid("GPU-1"), store)
    task = {"base_model": {"name": "acme/x"}, "prompt": "a cat", "task_config": {}}
    task["lora"] = {"model": "acme/y"}
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(task), None)
    for hits in (0, 2, 4):
        computed = mounted.run(order, lambda: False, lambda _step, _steps: None)
        assert computed.card == "GPU-1"
        assert mounted.usage() == CardUse(loads=7, hits=hits)
    # Reading ahead isn't a task's need yet.
    mounted.prefetch(order, lambda: True)
    assert mounted.usage().hits == 4


class Preloading:
    """Asks whether to go on before each model; `asked` are those that it got to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.preloaded: frozenset[str] = frozenset()

    def preload(self, models: Sequence[str], look: Callable[[], None]) -> tuple[str, ...]:
        for model in models:
            look()
            self.asked.append(model)
            self.preloaded |= {model} - {"b"}
        return tuple(f"{model}: no memory" for model in models if model == "b")


def test_what_is_kept_on_the_card_is_brought_one_by_one_and_gives_way() -> None:
    here = SimpleNamespace(on_disk=lambda: frozenset({"a", "b", "c"}))
    store, engine = cast(Keeper, SimpleNamespace(store=here)), Preloading()
    uuid, names = CardUuid("GPU-1"), ("a", "b", "away", "c")
    mounted = MountedEngine(cast("Engine", engine), uuid, store, names)

    def give_way() -> None:
        raise Cancelled("an attempt waits")

    assert mounted.tend(lambda: None) == ()
    with pytest.raises(Cancelled):
        mounted.tend(give_way)
    assert engine.asked == ["a"]
    assert mounted.tend(lambda: None) == ("b: no memory",)
    assert mounted.tend(lambda: None) == ()
    assert engine.asked == ["a", "b", "c"]
    assert not mounted.has_to_tend()


def go_on() -> None: ...


class Keeping:
    """Brings what has come right, and keeps it until it is taken away."""

    def __init__(self, *right: str) -> None:
        self.right = set(right)
        self.preloaded: frozenset[str] = frozenset()
        self.asked: list[tuple[str, ...]] = []

    def preload(self, models: tuple[str, ...], _look: object) -> tuple[str, ...]:
        self.asked.append(models)
        self.preloaded |= self.right & set(models)
        return tuple(f"{name}: no" for name in models if name not in self.preloaded)


class Shelf:
    def __init__(self, *here: str) -> None:
        self.here = frozenset(here)

    @property
    def store(self) -> Shelf:
        return self

    def on_disk(self) -> frozenset[str]:
        return self.here


def test_what_could_not_be_preloaded_is_tried_again_after_a_pause() -> None:
    now, engine, shelf = [0.0], Keeping("a/a"), Shelf("a/a", "b/b", "c/c")
    mounted = MountedEngine(
        cast("Engine", engine),
        CardUuid("GPU-1"),
        cast(Keeper, shelf),
        ["a/a", "b/b"],
        clock=lambda: now[0],
    )
    assert mounted.has_to_tend()
    assert mounted.tend(go_on) == ()
    assert mounted.tend(go_on) == ("b/b: no",)
    assert not mounted.has_to_tend()
    now[0] = PRELOAD_PAUSE - 1
    assert not mounted.has_to_tend()
    now[0] = PRELOAD_PAUSE
    engine.right.add("b/b")
    assert mounted.has_to_tend()
    assert mounted.tend(go_on) == ()
    assert not mounted.has_to_tend()
    assert engine.asked == [("a/a",), ("b/b",), ("b/b",)]


def test_what_is_kept_no_more_is_preloaded_again_at_once() -> None:
    engine = Keeping("a/a")
    shelf = cast(Keeper, Shelf("a/a"))
    mounted = MountedEngine(cast("Engine", engine), CardUuid("GPU-1"), shelf, ["a/a", "b/b"])
    mounted.tend(go_on)
    assert not mounted.has_to_tend(), "the other one hasn't come yet"
    engine.preloaded = frozenset()
    assert mounted.has_to_tend()
    mounted.tend(go_on)
    assert engine.asked == [("a/a",)] * 2
