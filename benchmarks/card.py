"""The card of a process that can't ask NVML, which `pynvml` is for."""

from __future__ import annotations

from cluster.core.types import GpuClass
from cluster.inference.devices import Device, class_name, whole_gigabytes


def as_torch_has_it(number: int, platform: str) -> Device | None:
    """The card of that number among those that CUDA shows this process, described as torch has it;
    None where there is none."""
    import torch

    if number >= torch.cuda.device_count():
        return None
    found = torch.cuda.get_device_properties(number)
    kind = GpuClass(class_name(found.name, platform), whole_gigabytes(found.total_memory))
    return Device(f"GPU-{found.uuid}", f"cuda:{number}", kind)
