"""What a card's errors mean, by their types and by what it answers then; what can't be used."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
)
from cluster.core.types import GigaBytes, GpuClass
from cluster.inference import cuda
from cluster.inference.devices import SURROUNDINGS, Device
from cluster.inference.engine import Engine
from cluster.models.store import ModelStore

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
OUT_OF_MEMORY, CONTEXT_LOST, OTHER = (
    DeviceFaultKind.OUT_OF_MEMORY,
    DeviceFaultKind.CONTEXT_LOST,
    DeviceFaultKind.OTHER,
)


def of_code(code: int | None) -> Exception:
    error = torch.AcceleratorError("CUDA error: some text")
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _=None: None)


@pytest.fixture
def lost(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers everything with an error, as after an assertion that failed in a kernel."""

    def refuse(_: object = None) -> None:
        raise of_code(710)

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)


def kind(error: Exception, device: torch.device = CARD) -> DeviceFaultKind:
    fault = cuda.named(error, device)
    assert isinstance(fault, DeviceFault)
    assert type(error).__name__ in str(fault)
    return fault.kind


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (of_code(2), OUT_OF_MEMORY),
        (of_code(710), CONTEXT_LOST),
        (of_code(None), CONTEXT_LOST),
        (RuntimeError("CUDA out of memory"), OTHER),
        (ZeroDivisionError("ours\nalone"), OTHER),
    ],
)
@pytest.mark.usefixtures("card")
def test_an_error_is_judged_by_its_type(error: Exception, expected: DeviceFaultKind) -> None:
    assert kind(error) is expected
    assert "\n" not in str(cuda.named(error, CARD))


@pytest.mark.parametrize(
    "error", [of_code(710), RuntimeError("cuDNN"), ZeroDivisionError(), torch.OutOfMemoryError()]
)
@pytest.mark.usefixtures("lost")
def test_a_card_that_answers_no_more_has_lost_its_context(error: Exception) -> None:
    assert kind(error) is CONTEXT_LOST


SAID = (Cancelled("x"), TaskInvalid("x"), ModelUnavailable(ModelUnavailableKind.DAMAGED, "x"))


@pytest.mark.parametrize("error", SAID)
@pytest.mark.usefixtures("card")
def test_an_error_by_fault_stays_what_it_is(error: ClusterError) -> None:
    assert cuda.named(error, CARD) is error


@pytest.mark.parametrize("error", SAID)
@pytest.mark.usefixtures("lost")
def test_nobody_else_is_at_fault_on_a_lost_card(error: ClusterError) -> None:
    assert kind(error) is CONTEXT_LOST
    assert cuda.named(error, CPU) is error, "the CPU is asked nothing"


@pytest.mark.usefixtures("card")
def test_a_card_without_memory_to_answer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object = None) -> None:
        raise of_code(2)

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    assert kind(torch.OutOfMemoryError()) is OUT_OF_MEMORY


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def shortages(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the allocator counts; nothing before it was begun."""
    counted: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: dict(counted))
    return counted


def test_what_is_computed_with_room_enough_stands(shortages: dict[str, int]) -> None:
    with cuda.shortage_raised(CARD):
        shortages["num_alloc_retries"] = 3
    shortages["num_ooms"] = 4
    with pytest.raises(ZeroDivisionError), cuda.shortage_raised(CARD):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "error", [None, RuntimeError("unable to find an engine"), torch.OutOfMemoryError()]
)
def test_a_shortage_is_told_whatever_came_of_it(
    error: Exception | None, shortages: dict[str, int]
) -> None:
    with pytest.raises(cuda.ShortOfMemory) as caught, cuda.shortage_raised(CARD):
        shortages["num_ooms"] = 1
        if error is not None:
            raise error
    assert cuda.is_out_of_memory(caught.value)
    assert caught.value.__cause__ is error


def test_who_stops_is_not_short_of_memory(shortages: dict[str, int]) -> None:
    with pytest.raises(Cancelled), cuda.shortage_raised(CARD):
        shortages["num_ooms"] = 1
        raise Cancelled("x")


def test_a_cpu_counts_nothing(shortages: dict[str, int]) -> None:
    with cuda.shortage_raised(CPU):
        shortages["num_ooms"] = 1


# --- what is read as torch is loaded --------------------------------------------------------------


def test_torch_still_knows_the_setting_that_has_it_compile_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._native.common_utils import check_native_jit_disabled

    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    assert check_native_jit_disabled.__wrapped__()


# --- whether it can be used -----------------------------------------------------------------------

DEVICE = Device("GPU-1111", "cuda:0", GpuClass("NVIDIA A10+docker", GigaBytes(24)))


@pytest.fixture
def usable(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that computes, here on the CPU."""
    properties = SimpleNamespace(uuid="1111", major=8, minor=6)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120"])
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))


@pytest.mark.usefixtures("usable")
def test_a_card_that_computes_passes() -> None:
    cuda.check(DEVICE)


def _raises(error: Exception) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


OLD_DRIVER = RuntimeError("The NVIDIA driver on your system is too old")


@pytest.mark.parametrize(
    ("where", "name", "value", "says"),
    [
        (torch.version, "cuda", None, "is built for the CPU: install"),
        (
            torch.cuda,
            "get_device_properties",
            _raises(OLD_DRIVER),
            "driver must be one for",
        ),
        (torch.cuda, "get_device_properties", _raises(AssertionError()), "CUDA doesn't start"),
        (torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_87"], "capability 8.6 can't be used"),
        (torch.nn.functional, "conv2d", _raises(of_code(209)), "the card doesn't compute"),
        (torch.nn.functional, "conv2d", lambda *_: torch.zeros(1), "is wrong"),
        (torch.cuda, "synchronize", _raises(of_code(700)), "the card doesn't compute"),
    ],
)
@pytest.mark.usefixtures("usable")
def test_a_card_that_cant_be_used_says_what_to_do(
    where: Any, name: str, value: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, value)
    with pytest.raises(DeviceFault, match=says) as caught:
        cuda.check(DEVICE)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("usable")
def test_no_engine_is_made_on_such_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceFault, match="is built for the CPU"):
        Engine(DEVICE, ModelStore(tmp_path), time.time)


@pytest.mark.usefixtures("usable")
def test_the_card_that_computes_is_the_one_that_was_claimed() -> None:
    with pytest.raises(DeviceFault, match="GPU-2222 was claimed, and CUDA means 1111"):
        cuda.check(Device("GPU-2222", "cuda:0", DEVICE.gpu_class))


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_86", (8, 6), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_75", (8, 0), False),
        ("sm_120", (12, 1), True),
        ("sm_120", (10, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
        ("compute_90a", (12, 0), False),
    ],
)
def test_which_code_runs_on_which_card(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert cuda.runs_on(arch, *capability) is runs
