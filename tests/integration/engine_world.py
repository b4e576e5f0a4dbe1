"""The engine on tiny models, and orders for it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cluster.core.errors import (
    ClusterError,
)
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType, Timestamp
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import SD15

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
SIDE = 128
STEPS = 3


ROOMY = 2**30
ONE_PIPELINE = 7 * 2**20
"""Any of the tiny pipelines fits into that, and no two of them."""


def new_engine(root: Path, device_bytes: int = ROOMY, host_bytes: int = ROOMY) -> Engine:
    limits = Limits(device_bytes, host_bytes, threads=1)
    return Engine(DEVICE, ModelStore(root), time.time, limits)


def order(deadline: float | None = None, **changes: Any) -> Order:
    task = {"image_width": SIDE, "image_height": SIDE, "steps": STEPS, "num_images": 1, "seed": 5}
    task |= changes.pop("task_config", {})
    fields = {"base_model": SD15[0], "prompt": "a photo of a cat", "task_config": task} | changes
    return Order(
        AttemptId("attempt"),
        Commitment("0x01"),
        TaskType.SD,
        json.dumps(fields),
        None if deadline is None else Timestamp(deadline),
    )


def run(engine: Engine, what: Order) -> Computed:
    return engine.run(what, lambda: False, lambda _step, _steps: None)


def files(engine: Engine, **changes: Any) -> tuple[tuple[str, bytes], ...]:
    return run(engine, order(**changes)).files


def fault_of(engine: Engine, what: Order) -> ClusterError:
    with pytest.raises(ClusterError) as caught:
        run(engine, what)
    return caught.value


def two_images(**changes: Any) -> Order:
    return order(task_config={"num_images": 2}, **changes)


def open_png(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
