"""What only an NVIDIA card does: whether torch can use it, what its errors mean, when it ran short.

Nothing here reads an error's text. A context that a kernel has broken answers every later call with
an error, so what isn't understood is judged by asking the card once more.

Short of memory, cuDNN takes another plan for a convolution without a word, and keeps it for the
thread that asked: the same order could give other bits than with room enough. The allocator counts
how often it had nothing to give, so that is seen, whatever came of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import torch

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeadlinePassed,
    DeviceFault,
    DeviceFaultKind,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.inference.devices import Device
from cluster.inference.pool import release_memory

NO_MEMORY: Final = 2
"""`cudaErrorMemoryAllocation`; the context outlives it."""
SIDE: Final = 64
_NOT_OF_MEMORY: Final = (Cancelled, DeadlinePassed, TaskInvalid, TaskUnsupported)


class ShortOfMemory(Exception):
    """The card's memory ran short as it computed, so that the result can't be relied on."""


# --- errors ---------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == NO_MEMORY
    return isinstance(error, torch.OutOfMemoryError | MemoryError | ShortOfMemory)


def named(error: Exception, device: torch.device) -> ClusterError:
    """By whose fault it is: `error` itself where it says so, else the device's.

    The context is lost whatever the error was, if the card doesn't answer any more.
    """
    fault = error
    if not isinstance(fault, ClusterError):
        fault = DeviceFault(_kind(error), _line(error))
        with suppress(RuntimeError):  # of a lost context nothing can be released
            release_memory()
    if _is_lost(device):
        return DeviceFault(DeviceFaultKind.CONTEXT_LOST, _line(error))
    return fault


def _kind(error: Exception) -> DeviceFaultKind:
    if is_out_of_memory(error):
        return DeviceFaultKind.OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError):
        return DeviceFaultKind.CONTEXT_LOST
    return DeviceFaultKind.OTHER


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return not is_out_of_memory(error)
    return False


# --- memory ---------------------------------------------------------------------------------------


def shortages(device: torch.device) -> int:
    """How often the card had no memory to give so far, to whoever asked."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


@contextmanager
def shortage_raised(device: torch.device) -> Iterator[None]:
    """Raises `ShortOfMemory` if memory ran short inside, be it that it failed or that it didn't."""
    before = shortages(device)
    try:
        yield
    except _NOT_OF_MEMORY:
        raise
    except Exception as error:
        if shortages(device) > before:
            raise ShortOfMemory(f"the card's memory ran short ({_line(error)})") from error
        raise
    if shortages(device) > before:
        raise ShortOfMemory("the card's memory ran short, the result may be another one for it")


# --- whether it can be used -----------------------------------------------------------------------


def check(device: Device) -> None:
    """Raises `DeviceFault`, with what to do, if torch can't compute on this card or means another
    one by its number."""
    if torch.version.cuda is None:
        raise _fault(f"torch {torch.__version__} is built for the CPU: install its build for CUDA")
    where = torch.device(device.torch_device)
    driver = f"the NVIDIA driver must be one for CUDA {torch.version.cuda} or newer"
    try:
        properties = torch.cuda.get_device_properties(where)
    except (RuntimeError, AssertionError) as error:
        raise _fault(f"CUDA doesn't start: {driver}, see nvidia-smi ({_line(error)})") from error
    if _bare(device.uuid) != _bare(str(properties.uuid)):
        raise _fault(
            f"{device.uuid} was claimed, and CUDA means {properties.uuid} by {where}: it was begun"
            " before the claim"
        )
    built = torch.cuda.get_arch_list()
    if built and not any(runs_on(arch, properties.major, properties.minor) for arch in built):
        raise _fault(
            f"a card of compute capability {properties.major}.{properties.minor} can't be used:"
            f" torch {torch.__version__} is built for {' '.join(built)}"
        )
    try:
        right = _multiplies(where)
    except RuntimeError as error:
        raise _fault(f"the card doesn't compute; {driver} ({_line(error)})") from error
    if not right:
        raise DeviceFault(DeviceFaultKind.BAD_RESULT, "the card multiplies ones, and is wrong")


def _multiplies(where: torch.device) -> bool:
    """Whether cuBLAS and cuDNN give what they must on a few ones."""
    ones = torch.ones(1, 1, SIDE, SIDE, device=where)
    product = ones @ ones
    folded = torch.nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3, device=where))
    torch.cuda.synchronize(where)
    return bool((product == SIDE).all()) and bool((folded == 9).all())


def runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for `arch`, as torch names it, runs on a card of this compute capability.

    Machine code (`sm_86`) runs on later cards of its major number, that for one kind of card
    (`sm_90a`) on no other; what the driver compiles (`compute_90`) runs on all later ones.
    """
    kind, _, number = arch.partition("_")
    of = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return of == (major, minor)
    if kind == "compute":
        return of <= (major, minor)
    return of[0] == major and of[1] <= minor


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()


def _fault(line: str) -> DeviceFault:
    return DeviceFault(DeviceFaultKind.OTHER, line)
