"""NVIDIA's management library, and what each of its failures means.

`pynvml` (the extra `gpu`) makes one exception class of each error code, so all is told apart by
type. A value that a card or a driver doesn't have is None; a card that is gone, and a library that
fails, are faults of the device. Every function takes the module, so that tests may give another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, TypeVar

from cluster.core.errors import ClusterError, DeviceFault, DeviceFaultKind

Value = TypeVar("Value")

_ABSENT: Final = ("LibraryNotFound", "DriverNotLoaded")
_NOT_SAID: Final = (
    "NotSupported",
    "FunctionNotFound",
    "NoPermission",
    "NoData",
    "NotReady",
    "ArgumentVersionMismatch",
    "Deprecated",
    "InvalidArgument",
    "VgpuEccNotSupported",
)
"""This driver or card doesn't say: it is none the worse for it."""
_GONE: Final = ("GpuIsLost", "ResetRequired", "NotFound", "GpuNotFound", "InsufficientPower")

_REASONS: Final = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",  # its name until driver 535
)
_THROTTLING: Final = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the card",
    0x80: "power brake",
}
"""`nvmlClocksThrottleReason*` by bit; the others (idle, clocks set by someone) slow down nothing
that was to run."""


class NoDriver(ClusterError):
    """This machine has no NVIDIA driver, or no `pynvml` to ask it; the message says which."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """How a card does at this moment; None where the driver doesn't say.

    Memory is in bytes, the temperature in degrees Celsius; ECC errors are those since the driver
    was loaded; `throttling` names what slows the card down, and is empty when nothing does.
    """

    total_memory: int | None = None
    free_memory: int | None = None
    temperature: int | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    throttling: tuple[str, ...] | None = None


@contextmanager
def session(nvml: ModuleType | None = None) -> Iterator[ModuleType]:
    """The library, initialised. Raises `NoDriver`, or `DeviceFault` when it is there but fails."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            raise NoDriver("nvidia-ml-py is not installed (pip install '.[gpu]')") from None
    try:
        nvml.nvmlInit()
    except errors(nvml, _ABSENT) as error:
        raise NoDriver(f"no NVIDIA driver is loaded ({error})") from None
    except nvml.NVMLError as error:
        fault = f"NVML doesn't start: {error}"
        raise DeviceFault(DeviceFaultKind.OTHER, fault) from error
    try:
        yield nvml
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def count(nvml: ModuleType) -> int:
    """How many cards the driver has; raises `DeviceFault`."""
    return _asked(nvml, lambda: int(nvml.nvmlDeviceGetCount()))


def handle_at(nvml: ModuleType, index: int) -> object:
    """Raises `DeviceFault`."""
    handle: object = _asked(nvml, lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    return handle


def handle_of(nvml: ModuleType, uuid: str) -> object:
    """Raises `DeviceFault`, also when no card has that UUID."""
    handle: object = _asked(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
    return handle


def name_and_uuid(nvml: ModuleType, handle: object) -> tuple[str, str]:
    """The driver's name of the card and its UUID; raises `DeviceFault`."""
    name = _asked(nvml, lambda: _text(nvml.nvmlDeviceGetName(handle)))
    return name, _asked(nvml, lambda: _text(nvml.nvmlDeviceGetUUID(handle)))


def total_memory(nvml: ModuleType, handle: object) -> int | None:
    """Bytes, None where the driver doesn't say; raises `DeviceFault`."""
    return _maybe(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total))


def read_vitals(nvml: ModuleType, handle: object) -> Vitals:
    """Raises `DeviceFault` for a card that is gone, or a library that fails."""
    memory = _maybe(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    return Vitals(
        total_memory=None if memory is None else int(memory.total),
        free_memory=None if memory is None else int(memory.free),
        temperature=_maybe(
            nvml,
            lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ),
        ecc_corrected=_ecc(nvml, handle, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ecc_uncorrected=_ecc(nvml, handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        throttling=_throttling(nvml, handle),
    )


def mig_is_on(nvml: ModuleType, handle: object) -> bool:
    """Whether the card is cut into instances; raises `DeviceFault`."""
    modes = _if_there(nvml, "nvmlDeviceGetMigMode", handle)
    return modes is not None and int(modes[0]) == 1


def compute_capability(nvml: ModuleType, handle: object) -> tuple[int, int] | None:
    """Major and minor, None where the driver doesn't say; raises `DeviceFault`."""
    found = _if_there(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    return None if found is None else (int(found[0]), int(found[1]))


def driver_cuda(nvml: ModuleType) -> int | None:
    """The newest CUDA that the driver knows, as 1000 times major and 10 times minor; None where it
    doesn't say. Raises `DeviceFault`."""
    found = _if_there(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    return None if found is None else int(found)


def driver_version(nvml: ModuleType) -> str | None:
    """As `nvidia-smi` shows it, None where the driver doesn't say; raises `DeviceFault`."""
    found = _if_there(nvml, "nvmlSystemGetDriverVersion")
    return None if found is None else _text(found)


def errors(nvml: ModuleType, names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    """The library's exception classes of these names; an older one lacks some."""
    found = (getattr(nvml, f"NVMLError_{name}", None) for name in names)
    return tuple(kind for kind in found if kind is not None)


def _ecc(nvml: ModuleType, handle: object, kind: int) -> int | None:
    return _maybe(
        nvml, lambda: int(nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))
    )


def _throttling(nvml: ModuleType, handle: object) -> tuple[str, ...] | None:
    for name in _REASONS:
        bits = _if_there(nvml, name, handle)
        if bits is not None:
            return _reasons(int(bits))
    return None


def _if_there(nvml: ModuleType, name: str, *arguments: object) -> Any:
    """What a function says that an older library or driver doesn't have; None where it doesn't."""
    ask = getattr(nvml, name, None)
    return None if ask is None else _maybe(nvml, lambda: ask(*arguments))


def _reasons(bits: int) -> tuple[str, ...]:
    return tuple(words for bit, words in _THROTTLING.items() if bits & bit)


def _maybe(nvml: ModuleType, ask: Callable[[], Value]) -> Value | None:
    try:
        return ask()
    except errors(nvml, _NOT_SAID):
        return None
    except nvml.NVMLError as error:
        raise _judged(nvml, error) from error


def _asked(nvml: ModuleType, ask: Callable[[], Value]) -> Value:
    try:
        return ask()
    except nvml.NVMLError as error:
        raise _judged(nvml, error) from error


def _judged(nvml: ModuleType, error: Exception) -> DeviceFault:
    if isinstance(error, errors(nvml, _GONE)):
        return DeviceFault(DeviceFaultKind.CONTEXT_LOST, f"the card is gone: {error}")
    return DeviceFault(DeviceFaultKind.OTHER, f"NVML fails: {error}")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
