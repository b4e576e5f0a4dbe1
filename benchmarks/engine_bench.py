"""One family's measurements: the engine beside the bare loop, and what changes of model cost."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.bare_loop import CFG, NEGATIVE, PROMPT, SEED, BareTask, at_torchs_defaults, loop
from benchmarks.report import Figure, progress
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, TaskType
from cluster.inference.devices import Device
from cluster.inference.engine import Engine, Limits
from cluster.inference.pool import release_memory, release_pinned
from cluster.models.store import ModelStore
from devnet import full_size
from devnet.models import SD15

if TYPE_CHECKING:
    from benchmarks.engine_overhead import Chosen, Family

HOST_BYTES: Final = 16 * 2**30
"""SDXL in half precision takes 8.6 GiB of pinned memory, where tensors take powers of two."""
OTHER: Final = SD15[1]
"""The model for which others leave the card; tiny, whatever their size."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One family's task, for the engine on `device` and for the bare loop."""

    device: Device
    store: ModelStore
    model: str
    lora: str
    bare: BareTask

    def engine(self, device_bytes: int | None = None) -> Engine:
        return Engine(self.device, self.store, time.time, Limits(device_bytes, HOST_BYTES))

    def task(self) -> dict[str, Any]:
        config = {"image_width": self.bare.side, "image_height": self.bare.side}
        config |= {"steps": self.bare.steps, "num_images": self.bare.images}
        return {
            "base_model": self.model,
            "dtype": self.bare.dtype,
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "task_config": config | {"seed": SEED, "cfg": CFG},
        }


def prepare(family: Family, what: Chosen, device: Device, side: int | None) -> Bench:
    """Makes the models where they are missing; the store has to have the tiny ones."""
    model, lora = family.tiny, family.tiny_lora
    if what.size == "full":
        model, lora = family.full.model(what.dtype), family.full.lora(what.dtype)
        progress(f"making {model} where it is missing")
        full_size.make_full(family.full, what.root, what.dtype, device.torch_device)
        release_memory()
    side = side or (family.full_side if what.size == "full" else 256)
    bare = BareTask(
        str(what.root / model),
        family.full.text_2 is not None,
        what.dtype,
        device.torch_device,
        side,
        what.steps,
        what.images,
    )
    return Bench(device, ModelStore(what.root), model, lora, bare)


def measure(bench: Bench, rounds: int) -> dict[str, Figure]:
    """Never more than two of the family's models are on the card at a time."""
    theirs = loop(bench.bare)
    found = beside_the_engine(bench, theirs, rounds)
    release_memory()
    progress("torch's defaults")
    found |= beside_torchs_defaults(bench, theirs, rounds)
    del theirs
    progress("changes of model")
    found |= changes(bench, rounds)
    found["ratio_seconds_default"] = found["ratio_seconds"] * found["ratio_seconds_determinism"]
    return {
        name: round(figure, 4) if isinstance(figure, float) else figure
        for name, figure in found.items()
    }


def beside_the_engine(bench: Bench, theirs: Callable[[], bytes], rounds: int) -> dict[str, Any]:
    engine, task = bench.engine(), bench.task()

    def ours() -> Computed:
        return run(engine, task)

    others = allocated(bench.device)
    cold = timed(ours)
    score = ours().score
    peak = most_allocated(bench.device)
    same = score == theirs()
    medians = alternated({"engine": ours, "bare": theirs}, rounds)
    return {
        "ratio_seconds": medians["engine"] / medians["bare"],
        "seconds_engine": medians["engine"],
        "seconds_bare": medians["bare"],
        "images_per_second": bench.bare.images / medians["engine"],
        "peak_device_bytes": None if peak is None else peak - others,
        "seconds_first": cold,
        "same_score": same,
    }


def beside_torchs_defaults(
    bench: Bench, theirs: Callable[[], bytes], rounds: int
) -> dict[str, Any]:
    with at_torchs_defaults(bench.bare) as elsewhere:
        same = elsewhere().score == theirs()
        seconds: dict[str, list[float]] = {"bare": [], "default": []}
        for _ in range(rounds):
            seconds["bare"].append(timed(theirs))
            seconds["default"].append(elsewhere().seconds)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "ratio_seconds_determinism": medians["bare"] / medians["default"],
        "seconds_default": medians["default"],
        "same_score_default": same,
    }


def changes(bench: Bench, rounds: int) -> dict[str, Any]:
    """Medians of what each kind of change costs beyond a warm run, in seconds."""
    what = bench.task()
    what["task_config"] |= {"num_images": 1, "steps": 1}
    other, with_lora = what | {"base_model": OTHER}, what | {"lora": {"model": bench.lora}}
    seconds: dict[str, list[float]] = {"load": [], "host_return": [], "lora_switch": []}
    for _ in range(rounds):
        took = one_of_each(bench.engine(device_bytes=1), what, with_lora, other)
        forget(bench.device)
        for name, each in took.items():
            seconds[name].append(each)
    return {f"seconds_{name}": statistics.median(each) for name, each in seconds.items()}


def one_of_each(
    engine: Engine, what: dict[str, Any], with_lora: dict[str, Any], other: dict[str, Any]
) -> dict[str, float]:
    """On an engine that has nothing yet, and room on the card for one model."""
    cold = timed(lambda: run(engine, what))
    warm = timed(lambda: run(engine, what))
    lora = timed(lambda: run(engine, with_lora))
    run(engine, other)
    back = timed(lambda: run(engine, what))
    return {"load": cold - warm, "host_return": back - warm, "lora_switch": lora - warm}


def run(engine: Engine, what: dict[str, Any]) -> Computed:
    order = Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(what), None)
    return engine.run(order, lambda: False, lambda _step, _steps: None)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternated(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Each side's median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            seconds[name].append(timed(side))
        progress(f"round {number + 1} of {rounds}")
    return {name: statistics.median(each) for name, each in seconds.items()}


def allocated(device: Device) -> int:
    on_cpu = device.torch_device == "cpu"
    return 0 if on_cpu else torch.cuda.memory_allocated(device.torch_device)


def most_allocated(device: Device) -> int | None:
    """Since the engine began to compute its last task; None where it isn't counted."""
    on_cpu = device.torch_device == "cpu"
    return None if on_cpu else torch.cuda.max_memory_allocated(device.torch_device)


def forget(device: Device) -> None:
    """Gives all freed memory back, so that the next engine finds none that is pinned already."""
    release_memory()
    if device.torch_device != "cpu":
        release_pinned()
