"""What an order says, and whether it is wanted still."""

from __future__ import annotations

import json
from collections.abc import Callable

from cluster.core.errors import Cancelled, DeadlinePassed
from cluster.core.ports import Order
from cluster.core.types import TaskType, Timestamp
from cluster.inference.parameters import Parameters, parse
from cluster.models.store import ModelStore


def loaded_by_default(model: str, store: ModelStore) -> Parameters:
    """Parameters that say no more than the base model."""
    name, _, variant = model.partition("+")
    if store.is_language_model(name):
        return parse(TaskType.LLM, json.dumps({"model": name, "messages": [{"role": "user"}]}))
    base = {"name": name, "variant": variant or None}
    task = {"base_model": base, "prompt": "a", "task_config": {}}
    return parse(TaskType.SD, json.dumps(task))


def parsed(order: Order) -> Parameters:
    return parse(TaskType(order.task_type), order.parameters)


def check_wanted(
    deadline: Timestamp | None, cancelled: Callable[[], bool], clock: Callable[[], float]
) -> None:
    """Raises `Cancelled` or `DeadlinePassed`; `clock` is the one that deadlines are on."""
    if cancelled():
        raise Cancelled("cancelled")
    if deadline is not None and clock() >= deadline:
        raise DeadlinePassed("ran into the deadline")
