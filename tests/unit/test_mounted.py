"""What an engine asks of its machine's store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import pytest

from cluster.core.ports import CardUse, Computed, Order
from cluster.core.types import AttemptId, CardUuid, Commitment, TaskType
from cluster.inference.engine import Engine
from cluster.inference.mounted import MountedEngine
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
