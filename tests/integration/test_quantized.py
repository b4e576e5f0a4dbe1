"""Language models in 4 and 8 bits, by bitsandbytes on the CPU; on a card the path is the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import TaskUnsupported
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType
from cluster.inference import recipes
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import LLM, SD15

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
CHAT = [{"role": "user", "content": "what is a cat?"}]


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


def new_engine(root: Path, device_bytes: int = 2**30) -> Engine:
    return Engine(DEVICE, ModelStore(root), time.time, Limits(device_bytes, 2**30, threads=1))


def run(engine: Engine, bits: int | None, **fields: Any) -> Computed:
    config = {"max_new_tokens": 24, "do_sample": True, "temperature": 5.0}
    config["num_return_sequences"] = 8
    task = {"model": LLM, "messages": CHAT, "generation_config": config, "seed": 7}
    text = json.dumps(task | {"quantize_bits": bits} | fields)
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.LLM, text, None)
    return engine.run(order, lambda: False, lambda _step, _steps: None)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_bits_cold_warm_and_beside_the_whole_model(
    engine: Engine, tiny_models: Path, bits: int
) -> None:
    cold = run(new_engine(tiny_models), bits)
    assert run(engine, None).score != cold.score, "quantizing has to make a difference to be one"
    before = engine.counts.loads
    assert [run(engine, bits).score, run(engine, bits).score] == [cold.score] * 2
    assert engine.counts.loads == before + 1
    assert run(engine, None).score == run(new_engine(tiny_models), None).score


def test_four_and_eight_bits_are_two_models(engine: Engine) -> None:
    assert run(engine, 4).score != run(engine, 8).score
    warm = {key.rpartition("bits=")[2] for key in engine.state().warm if key.startswith(LLM)}
    assert {"4", "8"} <= warm


def test_what_is_quantized_leaves_the_card_for_good_and_comes_back_the_same(
    tiny_models: Path,
) -> None:
    small = new_engine(tiny_models, device_bytes=1)
    first = run(small, 8)
    picture = {"base_model": SD15[0], "prompt": "a", "task_config": {"num_images": 1}}
    order = Order(
        AttemptId("b"), Commitment("0x02"), TaskType.SD, json.dumps(picture | {"steps": 1}), None
    )
    small.run(order, lambda: False, lambda _step, _steps: None)
    assert not [key for key in small.state().warm if key.startswith(LLM)]
    assert LLM not in small.state().in_host_memory
    loads = small.counts.loads
    assert run(small, 8).score == first.score
    assert small.counts.loads == loads + 1


def test_without_the_library_it_is_our_limit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "find_spec", lambda _name: None)
    with pytest.raises(TaskUnsupported, match="bitsandbytes isn't installed"):
        run(engine, 4)
