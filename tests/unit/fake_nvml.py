"""A `pynvml` of a few cards: values, or the library's own errors in their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

GIB = 2**30

_ERRORS = (
    "LibraryNotFound", "DriverNotLoaded", "LibRmVersionMismatch", "NotSupported",
    "FunctionNotFound", "NoPermission", "Deprecated", "GpuIsLost", "NotFound", "Timeout", "Unknown",
)  # fmt: skip


class FakeError(Exception):
    """As in the library: a class for each code, whose text is not to be relied on."""


ERRORS: dict[str, type[FakeError]] = {
    name: type(f"NVMLError_{name}", (FakeError,), {}) for name in _ERRORS
}


def error(name: str) -> FakeError:
    return ERRORS[name](f"some text about {name}")


@dataclass
class FakeCard:
    """Each value may be an error instead, which asking for it raises."""

    name: Any = "NVIDIA GeForce RTX 4090"
    uuid: Any = "GPU-1111"
    memory: Any = field(default_factory=lambda: SimpleNamespace(total=24 * GIB, free=20 * GIB))
    temperature: Any = 41
    corrected: Any = 0
    uncorrected: Any = 0
    reasons: Any = 0
    mig: Any = (0, 0)
    capability: Any = (8, 9)
    handle: Any = None
    """What getting at the card raises."""


def _value(found: Any) -> Any:
    if isinstance(found, FakeError):
        raise found
    return found


class FakeNvml(ModuleType):
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVMLError = FakeError

    def __init__(
        self,
        *cards: FakeCard,
        init: FakeError | None = None,
        cuda: Any = 13000,
        driver: Any = "580.65.06",
        events: bool = True,
    ) -> None:
        super().__init__("pynvml")
        self.cards = cards
        self.cuda = cuda
        self.driver = driver
        self.events = events
        self.init = init
        self.open = 0
        for name, kind in ERRORS.items():
            setattr(self, f"NVMLError_{name}", kind)

    def nvmlInit(self) -> None:
        _value(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.open == 1
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        card = self.cards[index]
        _value(card.handle)
        return card

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> FakeCard:
        for card in self.cards:
            if card.uuid == uuid.decode():
                _value(card.handle)
                return card
        raise error("NotFound")

    def nvmlDeviceGetName(self, handle: FakeCard) -> Any:
        return _value(handle.name)

    def nvmlDeviceGetUUID(self, handle: FakeCard) -> Any:
        return _value(handle.uuid)

    def nvmlDeviceGetMemoryInfo(self, handle: FakeCard) -> Any:
        return _value(handle.memory)

    def nvmlDeviceGetTemperature(self, handle: FakeCard, sensor: int) -> Any:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return _value(handle.temperature)

    def nvmlDeviceGetTotalEccErrors(self, handle: FakeCard, kind: int, counter: int) -> Any:
        assert counter == self.NVML_VOLATILE_ECC
        corrected = kind == self.NVML_MEMORY_ERROR_TYPE_CORRECTED
        return _value(handle.corrected if corrected else handle.uncorrected)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeCard) -> Any:
        return _value(handle.reasons if self.events else error("FunctionNotFound"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: FakeCard) -> Any:
        return _value(error("Deprecated") if self.events else handle.reasons)

    def nvmlDeviceGetMigMode(self, handle: FakeCard) -> Any:
        return _value(handle.mig)

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeCard) -> Any:
        return _value(handle.capability)

    def nvmlSystemGetDriverVersion(self) -> Any:
        assert self.open == 1
        return _value(self.driver)

    def nvmlSystemGetCudaDriverVersion_v2(self) -> Any:
        return _value(self.cuda)
