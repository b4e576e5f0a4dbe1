"""Cards, as this machine has them and as the network will see them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.types import GigaBytes, GpuClass

MIB: int = 2**20


@dataclass(frozen=True, slots=True)
class Device:
    """One card. `torch_device` is torch's name for it in a process that sees all cards.

    `uuid` is stable over restarts; for a simulated card the configuration gives it.
    """

    uuid: str
    torch_device: str
    gpu_class: GpuClass
    simulated: bool = False


def class_name(driver_name: str, platform: str) -> str:
    """The network's name for a card, e.g. `NVIDIA GeForce RTX 4090+docker`."""
    return f"{driver_name}+{platform}"


def whole_gigabytes(memory_bytes: int) -> GigaBytes:
    """VRAM as the network counts it: MiB by 1024, rounded up."""
    return GigaBytes(math.ceil(memory_bytes // MIB / 1024))


def simulated(index: int, name: str, vram: GigaBytes) -> Device:
    """A card of that name that computes on the CPU: devnet and tests only."""
    return Device(f"simulated-{index}", "cpu", GpuClass(name, vram), simulated=True)


def list_gpus(platform: str) -> tuple[Device, ...]:
    """NVIDIA's cards in this machine by NVML; none without its driver or nvidia-ml-py."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_describe(pynvml, i, platform) for i in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


def visible(cards: Sequence[Device], mask: str | None) -> Device:
    """The one card that this process may use, among all of the machine's.

    `mask` is CUDA_VISIBLE_DEVICES as Ray sets it for an actor: an index or the start of a UUID;
    None where every card is visible. Raises `DeviceFault` when it doesn't name exactly one card.
    """
    named = [
        card
        for index, card in enumerate(cards)
        if mask is None or mask == str(index) or (mask and card.uuid.startswith(mask))
    ]
    if len(named) != 1:
        raise DeviceFault(
            DeviceFaultKind.OTHER,
            f"one card is wanted, CUDA_VISIBLE_DEVICES={mask!r} names {len(named)} of {len(cards)}",
        )
    # Where only one card is visible, torch counts from 0.
    return replace(named[0], torch_device="cuda:0")


def _describe(nvml: ModuleType, index: int, platform: str) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = whole_gigabytes(int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
    name = class_name(_text(nvml.nvmlDeviceGetName(handle)), platform)
    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
    return Device(uuid, f"cuda:{index}", GpuClass(name, memory))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
