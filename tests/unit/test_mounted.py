"""What an engine asks of its machine's store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from cluster.core.ports import Order
from cluster.core.types import AttemptId, CardUuid, Commitment, TaskType
from cluster.inference.engine import Engine
from cluster.inference.mounted import MountedEngine
from cluster.models.refusals import Refused
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
