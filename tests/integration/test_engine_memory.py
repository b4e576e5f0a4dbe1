"""What the engine does when the card's memory runs short, here as told by what stands in for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.core.errors import (
    Cancelled,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
)
from cluster.inference import cuda, diffusion, pool
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import SD15, SDXL
from tests.integration.engine_world import DEVICE, fault_of, new_engine, order, run


def no_memory() -> Exception:
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = 2  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), no_memory()])
@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_frees_all_and_tries_once_more(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, failures: int, error: Exception
) -> None:
    fresh = new_engine(tiny_models)
    real, calls = diffusion.make_images, []

    def make_images(*args: Any) -> Any:
        calls.append(1)
        if len(calls) <= failures:
            raise error
        return real(*args)

    run(fresh, order(base_model=SD15[1]))
    assert fresh.preload([SD15[1]]) == ()
    monkeypatch.setattr("cluster.inference.engine.make_images", make_images)
    if failures == 1:
        run(fresh, order())
    else:
        fault = fault_of(fresh, order())
        assert isinstance(fault, DeviceFault)
        assert fault.kind is DeviceFaultKind.OUT_OF_MEMORY
    assert len(calls) == 2
    assert len(fresh.state().warm) == 1
    assert fresh.preloaded == frozenset(), "what was to be kept is gone, and to be brought again"


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_short_while_a_model_is_read_is_not_the_models_fault(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The library that quantizes catches it, leaves the weight out, and says that the file has
    none."""
    fresh, expected = new_engine(tiny_models), run(new_engine(tiny_models), order()).score
    real, short = pool.Pool.hold, [0]
    monkeypatch.setattr(cuda, "shortages", lambda _: short[0])

    def hold(*args: Any) -> Any:
        if short[0] < times:
            short[0] += 1
            raise ModelUnavailable(ModelUnavailableKind.DAMAGED, "a weight is missing")
        return real(*args)

    monkeypatch.setattr(pool.Pool, "hold", hold)
    if times == 1:
        assert run(fresh, order()).score == expected
        return
    fault = fault_of(fresh, order())
    assert isinstance(fault, DeviceFault)
    assert fault.kind is DeviceFaultKind.OUT_OF_MEMORY


def test_what_there_is_no_room_to_keep_is_not_preloaded(tiny_models: Path) -> None:
    """It would take the room that computing needs, at each task."""
    small = new_engine(tiny_models, device_bytes=7 * 2**20)
    assert small.preload([SD15[0]]) == ()
    loads = small.counts.loads
    (problem,) = small.preload([SDXL])
    assert problem.startswith(f"{SDXL}: no room: with what is kept it takes 0.0 GiB")
    assert small.preloaded == {SD15[0]}
    assert small.counts.loads == loads


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("then", [None, RuntimeError("unable to find an engine")])
def test_where_memory_ran_short_another_thread_computes_once_more(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch, times: int, then: Exception | None
) -> None:
    """cuDNN makes do with less, gives other bits, and goes on so in that thread."""
    fresh, expected = new_engine(tiny_models), run(new_engine(tiny_models), order()).score
    threads: list[threading.Thread] = []
    real, short = diffusion.make_images, [0]
    monkeypatch.setattr(cuda, "shortages", lambda _: short[0])

    def make_images(*args: Any) -> Any:
        threads.append(threading.current_thread())
        if len(threads) <= times:
            short[0] += 1
            if then is not None:
                raise then
        return real(*args)

    monkeypatch.setattr("cluster.inference.engine.make_images", make_images)
    if times == 1:
        assert run(fresh, order()).score == expected
    else:
        fault = fault_of(fresh, order())
        assert isinstance(fault, DeviceFault)
        assert fault.kind is DeviceFaultKind.OUT_OF_MEMORY
    assert len(threads) == 2
    assert run(fresh, order()).score == expected
    assert len(set(threads)) == 1 + times, "only with room enough it stays the same one"
    assert not any(thread.is_alive() for thread in threads[:times])


def test_only_reading_a_model_takes_more_threads(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(2**30, 2**30, threads=1, loading_threads=3)
    fresh = Engine(DEVICE, ModelStore(tiny_models), time.time, limits)
    read, made, reading, making = [], [], pool.Pool.hold, diffusion.make_images

    def hold(*args: Any) -> Any:
        read.append(torch.get_num_threads())
        return reading(*args)

    def make_images(*args: Any) -> Any:
        made.append(torch.get_num_threads())
        return making(*args)

    monkeypatch.setattr(pool.Pool, "hold", hold)
    monkeypatch.setattr("cluster.inference.engine.make_images", make_images)
    assert run(fresh, order()).score == run(new_engine(tiny_models), order()).score
    assert fresh.preload([SD15[1]]) == ()
    assert (read, made) == ([3, 1, 3], [1, 1])


def test_a_preload_gives_way_between_parts_and_goes_on_from_there(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if fresh.counts.loads == 1:
            raise Cancelled("an attempt waits")

    with pytest.raises(Cancelled):
        fresh.preload([SD15[1]], look)
    assert (fresh.counts.loads, looks > 1) == (1, True)
    assert run(fresh, order(base_model=SD15[1])).score
    loads = fresh.counts.loads
    assert fresh.preload([SD15[1]]) == ()
    assert fresh.counts.loads == loads, "what there was has stayed"
