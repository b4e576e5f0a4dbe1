"""The pool of warm parts against keeping one model and reloading on change: same trace, same run.

The trace: tasks over twelve model sets, their popularity by Zipf's law, three in ten with a LoRA.
The pool may hold a share of all sets' bytes on the device and another in host memory, so that both
tiers have to choose. The other policy keeps what the last task needed, and loads anew for any other
model set or LoRA, as the network's own worker does.

A load is a task for which something had to come from disk. Torch, and what takes it along, is
imported after the card was claimed.

    python -m benchmarks.warm_pool --device auto --json
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from benchmarks.report import Figure, arguments, claimed, progress, publish
from cluster.core.ports import Order
from cluster.core.types import AttemptId, Commitment, TaskType
from cluster.inference.parameters import SDParameters, parse
from cluster.models.store import ModelStore
from devnet import models

if TYPE_CHECKING:
    from cluster.inference.engine import Engine

ZIPF: Final = 1.1
LORA_SHARE: Final = 0.3


def picture() -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def model_sets() -> list[dict[str, Any]]:
    """Twelve, some of which share parts, as published models do."""
    first, second = models.SD15
    refiner = {"model": models.SDXL_REFINER, "steps": 2}
    return [
        {"base_model": first},
        {"base_model": second},
        {"base_model": models.SDXL},
        {"base_model": models.SD2},
        {"base_model": models.SDXL_TURBO},
        {"base_model": models.SDXL, "refiner": refiner},
        {"base_model": first, "controlnet": controlled(models.SD15_CONTROLNET)},
        {"base_model": models.SDXL, "controlnet": controlled(models.SDXL_CONTROLNET)},
        {"base_model": second, "vae": models.SD15_VAE},
        {"base_model": first, "unet": models.SD15_UNET},
        {"base_model": models.SD15_FLAGS_NONE},
        {"base_model": first, "dtype": "bfloat16"},
    ]


def controlled(model: str) -> dict[str, Any]:
    return {"model": model, "image_dataurl": picture()}


def lora_for(chosen: dict[str, Any], draw: random.Random) -> dict[str, Any] | None:
    """One of two LoRAs that go with the set, or none."""
    if draw.random() >= LORA_SHARE or chosen["base_model"] == models.SD2:
        return None
    is_xl = chosen["base_model"] in {models.SDXL, models.SDXL_TURBO}
    of_family = (
        (models.SDXL_LORA, models.SDXL_LORA_KOHYA)
        if is_xl
        else (models.SD15_LORA, models.SD15_LORA_KOHYA)
    )
    return {"model": draw.choice(of_family)}


def trace(tasks: int, seed: int) -> list[dict[str, Any]]:
    """Each task's parameters, without what is the same for all."""
    draw = random.Random(seed)  # noqa: S311 - a seeded trace
    sets = model_sets()
    draw.shuffle(sets)
    weights = [1 / rank**ZIPF for rank in range(1, len(sets) + 1)]
    chosen = draw.choices(sets, weights, k=tasks)
    return [each | {"lora": lora_for(each, draw)} for each in chosen]


def order(fields: dict[str, Any]) -> Order:
    config = {"image_width": 64, "image_height": 64, "steps": 2, "num_images": 1, "seed": 1}
    task = {"prompt": "a photo of a cat", "task_config": config} | fields
    return Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(task), None)


@dataclass
class Tally:
    loads: int = 0
    part_loads: int = 0
    seconds: float = 0.0
    scores: tuple[bytes, ...] = ()


class Policy:
    """Runs a trace on the engine that `engine_for` gives for each task."""

    def __init__(self, engine_for: Callable[[dict[str, Any]], Engine]) -> None:
        self._engine_for = engine_for
        self.tally = Tally()

    def run(self, fields: dict[str, Any]) -> None:
        began = time.perf_counter()
        engine = self._engine_for(fields)
        before = engine.counts.loads
        computed = engine.run(order(fields), lambda: False, lambda _step, _steps: None)
        self.tally.seconds += time.perf_counter() - began
        loaded = engine.counts.loads - before
        self.tally.loads += loaded > 0
        self.tally.part_loads += loaded
        self.tally.scores += (computed.score,)


def keep_one(engine: Engine) -> Callable[[dict[str, Any]], Engine]:
    """It forgets all that it has read whenever the models or the LoRA change."""
    last: list[str] = []

    def engine_for(fields: dict[str, Any]) -> Engine:
        key = json.dumps(fields, sort_keys=True)
        if last != [key]:
            engine.distrust()
            last[:] = [key]
        return engine

    return engine_for


def total_bytes(store: ModelStore, tasks: Sequence[dict[str, Any]]) -> int:
    """All parts of all sets, shared ones once, as they are on disk."""
    from cluster.inference.recipes import recipe_for

    sizes: dict[str, int] = {}
    for fields in tasks:
        params = parse(TaskType.SD, order(fields).parameters)
        assert isinstance(params, SDParameters)  # noqa: S101
        sizes |= {part.key: part.size for part in recipe_for(params, store).parts.values()}
    return sum(sizes.values())


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device-share", type=float, default=0.4, help="of all sets' bytes")
    parser.add_argument("--host-share", type=float, default=0.75)
    parser.add_argument("--models", type=Path, default=Path(".devnet/models"))
    asked = parser.parse_args()

    device = claimed(asked.device, os.environ)
    from cluster.inference.engine import Engine, Limits

    progress("making the tiny models where they are missing")
    models.make_models(asked.models)
    store = ModelStore(asked.models)
    tasks = trace(asked.tasks, asked.seed)
    everything = total_bytes(store, tasks)
    limits = Limits(
        int(everything * asked.device_share), int(everything * asked.host_share), threads=1
    )
    pooled = Engine(device, store, time.time, limits)
    ours = Policy(lambda _: pooled)
    theirs = Policy(keep_one(Engine(device, store, time.time, Limits(threads=1))))
    for number, fields in enumerate(tasks, 1):
        ours.run(fields)
        theirs.run(fields)
        if number % 50 == 0:
            progress(f"{number} of {len(tasks)} tasks")
    found = figures(ours.tally, theirs.tally, pooled, everything, asked)
    publish("warm_pool", found, device.torch_device, asked.json)


def figures(
    ours: Tally, theirs: Tally, engine: Engine, everything: int, asked: argparse.Namespace
) -> dict[str, Figure]:
    return {
        "loads": ours.loads,
        "loads_keep_one": theirs.loads,
        "ratio_loads": round(ours.loads / theirs.loads, 4),
        "seconds": round(ours.seconds, 2),
        "seconds_keep_one": round(theirs.seconds, 2),
        "ratio_seconds": round(ours.seconds / theirs.seconds, 4),
        "part_loads": ours.part_loads,
        "part_loads_keep_one": theirs.part_loads,
        "returns_from_host": engine.counts.returns,
        "same_scores": ours.scores == theirs.scores,
        "tasks": asked.tasks,
        "model_sets": len(model_sets()),
        "bytes_of_all_sets": everything,
        "device_share": asked.device_share,
        "host_share": asked.host_share,
    }


if __name__ == "__main__":
    main()
