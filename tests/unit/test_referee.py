"""Of numbers that are none: no card's fault where the CPU makes none either, else the card's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from cluster.core.errors import (
    Cancelled,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    ModelUnavailable,
    ModelUnavailableKind,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.inference.parts import looking
from cluster.inference.referee import NoNumbers, judged


@contextmanager
def copied(role: str) -> Iterator[str]:
    yield f"another {role}"


def asked(answer: Callable[[object], bool]) -> NoNumbers:
    return NoNumbers("latents that are none", "unet", answer)


def raises(error: BaseException) -> Callable[[object], bool]:
    def ask(_copy: object) -> bool:
        raise error

    return ask


def test_it_is_no_cards_fault_where_another_copy_makes_none_either() -> None:
    seen: list[object] = []

    def ask(copy: object) -> bool:
        seen.append(copy)
        return False

    found = judged(asked(ask), copied, None)
    assert isinstance(found, TaskUnsupported)
    assert "latents that are none" in str(found)
    assert seen == ["another unet"]


def test_it_is_the_cards_fault_where_another_copy_makes_some() -> None:
    found = judged(asked(lambda _copy: True), copied, None)
    assert type(found) is DeviceFault
    assert (found.kind, str(found)) == (DeviceFaultKind.BAD_RESULT, "latents that are none")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("not on a CPU"),
        NotImplementedError("not in 16 bits"),
        MemoryError(),
        IndexError("another vocabulary"),
        DeadlinePassed("too late"),
        ModelUnavailable(ModelUnavailableKind.UNREACHABLE, "gone"),
        TaskInvalid("never to be made of an answer here"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_known_stays_the_cards(error: Exception) -> None:
    found = judged(asked(raises(error)), copied, None)
    assert type(found) is DeviceFault
    assert found.kind is DeviceFaultKind.BAD_RESULT


def test_a_part_that_cannot_be_had_again_leaves_it_with_the_card() -> None:
    @contextmanager
    def gone(_role: str) -> Iterator[object]:
        raise ModelUnavailable(ModelUnavailableKind.NOT_HERE, "gone")
        yield

    assert type(judged(asked(lambda _copy: False), gone, None)) is DeviceFault


def test_a_cancelled_task_waits_for_no_answer() -> None:
    with pytest.raises(Cancelled):
        judged(asked(raises(Cancelled("cancelled"))), copied, None)


def test_other_faults_are_the_devices_without_asking() -> None:
    lost = DeviceFault(DeviceFaultKind.BAD_RESULT, "a file that doesn't read back")
    found = judged(lost, copied, None)
    assert type(found) is DeviceFault
    assert str(found) == str(lost)


def test_it_travels_as_the_devices_fault() -> None:
    fault = asked(lambda _copy: True)
    fault.trace = "somewhere"
    sent = pickle.loads(pickle.dumps(fault))  # noqa: S301
    assert type(sent) is DeviceFault
    assert (sent.kind, str(sent), sent.trace) == (fault.kind, str(fault), "somewhere")


def test_torchs_settings_are_as_they_were() -> None:
    def settings() -> tuple[int, bool, bool]:
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    before = settings()
    during: list[tuple[int, bool, bool]] = []

    def ask(_copy: object) -> bool:
        during.append(settings())
        raise RuntimeError

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        judged(asked(ask), copied, 2)
        assert settings() == (before[0], True, True)
        assert during == [(2, False, False)]
    finally:
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_made_wide_and_rounded_as_on_a_card(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows, weights = torch.randn(4, 64).to(dtype), torch.randn(8, 64).to(dtype)
    expected = functional.linear(rows.float(), weights.float()).to(dtype)
    looks: list[int] = []
    made: list[torch.Tensor] = []

    def ask(_copy: object) -> bool:
        made.extend((functional.linear(rows, weights), rows @ weights.T))
        made.append(torch.nn.Linear(64, 8, bias=False, dtype=dtype)(rows))
        return True

    with looking(lambda: looks.append(1)):
        judged(asked(ask), copied, None)
    assert torch.equal(made[0], expected)
    assert torch.equal(made[1], expected)
    assert made[2].dtype is dtype
    assert len(looks) == 3


def test_sums_beyond_a_dtype_are_beyond_it_there_too() -> None:
    many = torch.full((1, 64), 200.0, dtype=torch.float16)

    def is_finite(_copy: object) -> bool:
        return bool(torch.isfinite(functional.linear(many, many)).all())

    assert isinstance(judged(asked(is_finite), copied, None), TaskUnsupported)
    many = many.bfloat16()
    assert type(judged(asked(is_finite), copied, None)) is DeviceFault
