"""One card's executor: an order in, result files and their score out, or an error by fault.

    run ─ parse ─ pipeline (warm, else loaded) ─ LoRA on ─ images ─ LoRA off ─ checks ─ score
                      └─ out of memory: free all, once more ─┘

One thread runs orders; any thread may ask for `state`. The same order gives the same bits cold,
warm, after any other order and in another process: deterministic algorithms, no TF32, everything
seeded, and a pipeline that an order may have changed is thrown away.

Whatever isn't understood is the device's fault (`DeviceFault`), never the task's: `except
Exception` stands only here, at the top.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final

import torch

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    TaskUnsupported,
)
from cluster.core.ports import Computed, Order
from cluster.core.types import GpuClass, TaskType, Timestamp
from cluster.inference import lora
from cluster.inference.devices import Device
from cluster.inference.diffusion import Made, encode, make_images
from cluster.inference.parameters import SDParameters, parse
from cluster.inference.pipelines import Pipeline, Pool, cross_attention_width, release_memory
from cluster.inference.scoring import score_images
from cluster.models.store import ModelStore

OutOfMemory: Final = (torch.OutOfMemoryError, MemoryError)
Check = Callable[[], None]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class EngineState:
    """A moment's view. `warm` and `in_host_memory` hold pipeline keys, `on_disk` base keys."""

    warm: frozenset[str] = frozenset()
    in_host_memory: frozenset[str] = frozenset()
    on_disk: frozenset[str] = frozenset()
    step: int = 0
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_pipelines` stay warm as long as they fit `memory_share` of the card's VRAM.

    `threads`: CPU threads for torch, None leaves torch's own choice; results depend on it.
    """

    max_pipelines: int = 4
    memory_share: float = 0.7
    threads: int | None = None


class Engine:
    """`clock` is the machine's unix time, by which an order's deadline is judged."""

    def __init__(
        self,
        device: Device,
        store: ModelStore,
        clock: Callable[[], float],
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        make_deterministic(limits.threads)
        self._device = device
        self._store = store
        self._clock = clock
        budget = int(device.gpu_class.vram * 2**30 * limits.memory_share)
        self._pool = Pool(store, torch.device(device.torch_device), limits.max_pipelines, budget)
        self._state = EngineState(on_disk=store.on_disk())

    @property
    def gpu_class(self) -> GpuClass:
        return self._device.gpu_class

    @property
    def loads(self) -> int:
        """How many pipelines were loaded so far."""
        return self._pool.loads

    def state(self) -> EngineState:
        return self._state

    def run(self, order: Order, cancelled: Callable[[], bool], on_step: OnStep) -> Computed:
        """Compute one order; blocks. `on_step` gets (steps done, steps in all), after each step.

        Raises `TaskInvalid`, `TaskUnsupported`, `DeviceFault`, `ModelUnavailable`, `Cancelled` or
        `DeadlinePassed`, and nothing else.
        """
        began = monotonic()
        try:
            files = self._run(order, cancelled, on_step)
            score = score_images([content for _, content in files])
            return Computed(score, files, monotonic() - began)
        except ClusterError:
            raise
        except OutOfMemory as error:
            raise _fault(DeviceFaultKind.OUT_OF_MEMORY, error) from error
        except torch.AcceleratorError as error:
            raise _fault(DeviceFaultKind.CONTEXT_LOST, error) from error
        except Exception as error:
            raise _fault(DeviceFaultKind.OTHER, error) from error
        finally:
            self._note(step=0, steps=0)

    def _run(
        self, order: Order, cancelled: Callable[[], bool], on_step: OnStep
    ) -> tuple[tuple[str, bytes], ...]:
        params = parse(TaskType(order.task_type), order.parameters)
        _check_supported(params)

        def check() -> None:
            _check_wanted(order.deadline, cancelled, self._clock)

        def progress(step: int, steps: int) -> None:
            self._note(step=step, steps=steps)
            on_step(step, steps)
            check()

        try:
            made = self._images(params, check, progress)
        except OutOfMemory:
            made = None
        if made is None:  # out of the handler, which would keep the failed run's tensors alive
            self._pool.clear()
            made = self._images(params, check, progress)
        check()
        return tuple((f"{i}.png", encode(image, params)) for i, image in enumerate(made))

    def _images(self, params: SDParameters, check: Check, progress: OnStep) -> list[Made]:
        check()
        lora_file = None
        if params.lora is not None:
            lora_file = self._store.lora_file(params.lora.model, params.lora.weight_file_name)
            base = params.base_model
            folder = self._store.resolve("base", base.name, base.variant)
            lora.check_family(lora_file, cross_attention_width(folder))
        pipeline = self._pool.get(params)
        self._note(step=0, steps=0)
        check()
        try:
            with (
                lora.attached(pipeline.pipe, lora_file, params.lora.weight / 100)
                if lora_file is not None and params.lora is not None
                else nullcontext()
            ):
                return make_images(pipeline, params, progress)
        finally:
            self._restore(pipeline)

    def _restore(self, pipeline: Pipeline) -> None:
        if not lora.is_bare(pipeline.pipe):
            self._pool.discard(pipeline)

    def _note(self, step: int, steps: int) -> None:
        """Replaces the whole state at once, so that another thread never sees half of it."""
        on_disk = self._store.on_disk() if step == 0 else self._state.on_disk
        self._state = replace(
            self._state, warm=self._pool.keys(), on_disk=on_disk, step=step, steps=steps
        )


def make_deterministic(threads: int | None) -> None:
    """This process's torch computes the same bits every time. Call before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _check_wanted(
    deadline: Timestamp | None, cancelled: Callable[[], bool], clock: Callable[[], float]
) -> None:
    if cancelled():
        raise Cancelled("cancelled")
    if deadline is not None and clock() >= deadline:
        raise DeadlinePassed("ran into the deadline")


def _check_supported(params: SDParameters) -> None:
    asked = {
        "controlnet": params.controlnet is not None,
        "refiner": params.refiner is not None,
        "textual_inversion": bool(params.textual_inversion),
        "unet": bool(params.unet),
        "vae": bool(params.vae),
    }
    for what, wanted in asked.items():
        if wanted:
            raise TaskUnsupported(f"{what} is not run by this version")


def _fault(kind: DeviceFaultKind, error: BaseException) -> DeviceFault:
    release_memory()
    line = " ".join(str(error).split())[:200]
    return DeviceFault(kind, f"{type(error).__name__}: {line}")
