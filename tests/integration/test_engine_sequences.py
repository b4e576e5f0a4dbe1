"""The same task, the same bits: whatever ran before it, and wherever its models came from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core.errors import ClusterError
from cluster.core.ports import Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import SD15, SD15_LORA, SDXL, SDXL_LORA, make_models

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
SMALLEST, LARGEST = 3 * 2**20, 24 * 2**20
"""Bytes for a tier: from less than one tiny pipeline to all of them."""

TASKS: dict[str, dict[str, Any]] = {
    "a": {"base_model": SD15[0]},
    "a, weighted": {"base_model": SD15[0], "prompt": "a (red cat)1.3 in the forest"},
    "a, long": {"base_model": SD15[0], "prompt": "a cat in the forest, " * 30},
    "a, lora": {"base_model": SD15[0], "lora": {"model": SD15_LORA, "weight": 60}},
    "a, bfloat16": {"base_model": SD15[0], "dtype": "bfloat16"},
    "a, euler": {
        "base_model": SD15[0],
        "scheduler": {"method": "EulerAncestralDiscreteScheduler"},
    },
    "b": {"base_model": SD15[1]},
    "b, lcm": {"base_model": SD15[1], "scheduler": {"method": "LCMScheduler"}},
    "xl": {"base_model": SDXL},
    "xl, lora": {"base_model": SDXL, "lora": {"model": SDXL_LORA}},
    "wrong lora": {"base_model": SD15[0], "lora": {"model": SDXL_LORA}},
    "not here": {"base_model": "org/none"},
}
STOPPED = "stopped after its first step"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    make_models(path)
    return path


def order(name: str) -> Order:
    config = {"image_width": 64, "image_height": 64, "steps": 2, "num_images": 2, "seed": 3}
    fields = {"prompt": "a photo of a cat", "task_config": config} | TASKS[name]
    return Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(fields), None)


def outcome(engine: Engine, name: str, stopped: bool = False) -> object:
    """Files and score, or the error's type."""
    seen: list[int] = []
    try:
        computed = engine.run(
            order(name), lambda: stopped and bool(seen), lambda s, _: seen.append(s)
        )
    except ClusterError as error:
        return type(error).__name__
    return computed.files, computed.score


def new_engine(root: Path, device: int = LARGEST, host: int = LARGEST) -> Engine:
    return Engine(DEVICE, ModelStore(root), time.time, Limits(device, host, threads=1))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, object]:
    """Each task on a card that has never done anything else."""
    return {name: outcome(new_engine(root), name) for name in TASKS}


def test_the_tasks_differ(expected: dict[str, object]) -> None:
    pictures = [made for made in expected.values() if isinstance(made, tuple)]
    assert len(pictures) == len(TASKS) - 2
    assert len({made[0][0][1] for made in pictures}) == len(pictures)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    names=st.lists(
        st.tuples(st.sampled_from(sorted(TASKS)), st.booleans()), min_size=2, max_size=7
    ),
    device=st.integers(SMALLEST, LARGEST),
    host=st.sampled_from([0, SMALLEST, LARGEST]),
)
def test_any_sequence_gives_each_task_its_own_bits(
    root: Path, expected: dict[str, object], names: list[tuple[str, bool]], device: int, host: int
) -> None:
    """In any order, with any of them stopped half-way, on a card of any size."""
    engine = new_engine(root, device, host)
    for name, stopped in names:
        made = outcome(engine, name, stopped)
        if stopped:
            assert made in {"Cancelled", expected[name]} if isinstance(made, str) else False
        else:
            assert made == expected[name]
