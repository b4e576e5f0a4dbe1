"""What a card's errors mean, by their types and by what the card answers then."""

from __future__ import annotations

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
from cluster.inference import cuda

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
