"""What is near the card and may have gone bad there is read from disk anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.types import TaskType
from cluster.inference.engine import Engine
from devnet.models import LLM, SD15
from tests.integration.engine_world import ROOMY, fault_of, new_engine, order, run


def go_bad(engine: Engine, part: str, value: float) -> None:
    """As when memory fails: the weights of the part are another number, wherever they lie."""
    for there in engine._pool._parts.values():
        if there.source.folder.name == part:
            for tensor in (*there.module.parameters(), *(there.host or ())):
                if tensor.is_floating_point():
                    tensor.data.fill_(value)


@pytest.mark.parametrize(("part", "host"), [("unet", 0), ("text_encoder", ROOMY)])
def test_what_gave_a_bad_result_is_not_used_again(tiny_models: Path, part: str, host: int) -> None:
    fresh = new_engine(tiny_models, host_bytes=host)
    expected = run(fresh, order()).files
    go_bad(fresh, part, float("nan"))
    loads = fresh.counts.loads
    fault = fault_of(fresh, order())
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT
    assert run(fresh, order()).files == expected
    assert fresh.counts.loads == 2 * loads


def test_a_language_model_that_gave_a_bad_result_is_not_used_again(tiny_models: Path) -> None:
    said = {"messages": [{"role": "user", "content": "a cat"}]}
    task = {"model": LLM, "generation_config": {"max_new_tokens": 3}} | said
    chat = replace(order(), task_type=TaskType.LLM, parameters=json.dumps(task))
    fresh = new_engine(tiny_models)
    expected = run(fresh, chat).files
    go_bad(fresh, LLM.partition("/")[2], float("nan"))
    fault = fault_of(fresh, chat)
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.BAD_RESULT
    assert run(fresh, chat).files == expected


def test_an_order_of_a_card_in_doubt_uses_nothing_from_before(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    assert fresh.preload([SD15[0]]) == ()
    loads = fresh.counts.loads
    expected = run(fresh, replace(order(), afresh=True)).files
    assert fresh.counts.loads == loads, "no order has computed with it yet"
    go_bad(fresh, "unet", 0.01)
    assert run(fresh, order()).files != expected
    assert run(fresh, replace(order(), afresh=True)).files == expected
    assert run(fresh, order()).files == expected
    assert fresh.counts.loads == 2 * loads
