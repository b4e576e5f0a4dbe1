"""What only an NVIDIA card does: what its errors mean.

Nothing here reads an error's text. A context that a kernel has broken answers every later call with
an error, so what isn't understood is judged by asking the card once more.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import torch

from cluster.core.errors import (
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
)
from cluster.inference.pool import release_memory

NO_MEMORY: Final = 2
"""`cudaErrorMemoryAllocation`; the context outlives it."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == NO_MEMORY
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


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
