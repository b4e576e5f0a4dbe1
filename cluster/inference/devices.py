"""Cards, as this machine has them and as the network will see them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Final, Literal

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.types import GigaBytes, GpuClass
from cluster.inference import nvml as library
from cluster.inference.nvml import NoDriver, Vitals

MIB: Final = 2**20
MOST_THREADS: Final = 8
"""Beyond these reading gains little, and a container may have fewer cores than it sees."""
MASK: Final = "CUDA_VISIBLE_DEVICES"
SURROUNDINGS: Final[Mapping[str, str]] = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's
    # Torch 2.13 puts kernels that are compiled as they are needed in the place of its own.
    "TORCH_DISABLE_NATIVE_JIT": "1",
    # Convolution plans that cuDNN keeps for a thread, about 200 kB each; torch's default is 10000.
    "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT": "2000",
}
"""What torch and CUDA read but once, as they are loaded."""
TORCH: Final = "torch 2.13"
LEAST_CAPABILITY: Final = (7, 5)
LEAST_CUDA: Final = 13_000
"""What `TORCH` asks of a card and its driver in its usual wheel, which is for CUDA 13."""


@dataclass(frozen=True, slots=True)
class Device:
    """One card. `torch_device` is torch's name for it in a process that sees all cards.

    `uuid` is stable over restarts; for a simulated card the configuration gives it.
    """

    uuid: str
    torch_device: str
    gpu_class: GpuClass
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Card:
    """One of this machine's NVIDIA cards by its number in NVML.

    `device` is None for a card that can't be used; `problem` says in one line what is wrong, also
    with a card that torch as it is usually installed can't use.
    """

    index: int
    device: Device | None
    vitals: Vitals = Vitals()  # noqa: RUF009 - frozen
    problem: str = ""


def class_name(driver_name: str, platform: str) -> str:
    """The network's name for a card, e.g. `NVIDIA GeForce RTX 4090+docker`."""
    return f"{driver_name}+{platform}"


def whole_gigabytes(memory_bytes: int) -> GigaBytes:
    """VRAM as the network counts it: MiB by 1024, rounded up."""
    return GigaBytes(math.ceil(memory_bytes // MIB / 1024))


def simulated(index: int, name: str, vram: GigaBytes) -> Device:
    """A card of that name that computes on the CPU: devnet and tests only."""
    return Device(f"simulated-{index}", "cpu", GpuClass(name, vram), simulated=True)


def cpu(platform: str) -> Device:
    """This machine's CPU as a card; its memory is the machine's. Used only where asked for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "cpu", GpuClass(class_name("CPU", platform), whole_gigabytes(memory)))


def survey(platform: str, nvml: ModuleType | None = None) -> tuple[Card, ...]:
    """All NVIDIA cards of this machine, in NVML's order.

    Raises `NoDriver` where there can be none, `DeviceFault` when the library fails.
    """
    with library.session(nvml) as session:
        return tuple(_card(session, index, platform) for index in range(library.count(session)))


def list_gpus(platform: str, nvml: ModuleType | None = None) -> tuple[Device, ...]:
    """The NVIDIA cards that can be used; none without the driver. Raises `DeviceFault`."""
    try:
        cards = survey(platform, nvml)
    except NoDriver:
        return ()
    return tuple(card.device for card in cards if card.device is not None)


def vitals(uuid: str, nvml: ModuleType | None = None) -> Vitals:
    """How the card does now.

    Raises `NoDriver`, or `DeviceFault` when the card is gone or the library fails.
    """
    with library.session(nvml) as session:
        return library.read_vitals(session, library.handle_of(session, uuid))


def libraries(uuid: str, nvml: ModuleType | None = None) -> dict[str, str]:
    """The versions of driver, CUDA and cuDNN, by which what a card computes may differ; none for
    what is no NVIDIA card. Takes torch with it. Raises `NoDriver`, or `DeviceFault`."""
    if not uuid.startswith("GPU-"):
        return {}
    import torch

    with library.session(nvml) as session:
        driver = library.driver_version(session)
    found = {
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }
    return {name: str(version) for name, version in found.items() if version is not None}


def share_of_cores(cores: int, nvml: ModuleType | None = None) -> int:
    """How many of the machine's cores one card's process may use, when it reads a model.

    Raises `NoDriver`, or `DeviceFault`.
    """
    with library.session(nvml) as session:
        return max(1, min(MOST_THREADS, cores // max(1, library.count(session))))


def choose(
    asked: Literal["auto", "cuda", "cpu"], platform: str, nvml: ModuleType | None = None
) -> Device:
    """For programs that run outside the cluster: the first card, or the CPU if `auto` finds none.

    Raises `DeviceFault` when `cuda` was asked for and there is no card.
    """
    gpus = () if asked == "cpu" else list_gpus(platform, nvml)
    if gpus:
        return gpus[0]
    if asked == "cuda":
        raise DeviceFault(DeviceFaultKind.OTHER, "no NVIDIA card can be used on this machine")
    return cpu(platform)


def prepare(environment: MutableMapping[str, str]) -> None:
    """For every process that computes. Call before torch is first imported."""
    environment.update(SURROUNDINGS)


def claim(
    platform: str, environment: MutableMapping[str, str], nvml: ModuleType | None = None
) -> Device:
    """The one card that this process may use. Call before torch is first imported: libraries begin
    CUDA as they are imported, and from then on it looks at no mask.

    Ray's mask is a number in NVML's order, which need not be CUDA's, so the card's UUID takes its
    place: what is computed on is what was named. Raises `DeviceFault`.
    """
    prepare(environment)
    try:
        cards = survey(platform, nvml)
    except NoDriver as error:
        raise DeviceFault(DeviceFaultKind.OTHER, str(error)) from error
    device = visible(cards, environment.get(MASK))
    environment[MASK] = device.uuid
    return device


def visible(cards: Sequence[Card], mask: str | None) -> Device:
    """The one card that this process may use, among all of the machine's.

    `mask` is CUDA_VISIBLE_DEVICES as Ray sets it for an actor: an index or the start of a UUID;
    None where every card is visible. Raises `DeviceFault` when it doesn't name exactly one card,
    or one that can't be used.
    """
    named = [card for card in cards if mask is None or _is_named(card, mask)]
    if len(named) != 1:
        raise DeviceFault(
            DeviceFaultKind.OTHER,
            f"one card is wanted, {MASK}={mask!r} names {len(named)} of {len(cards)}",
        )
    if named[0].device is None:
        raise DeviceFault(DeviceFaultKind.OTHER, f"card {named[0].index}: {named[0].problem}")
    # Where only one card is visible, torch counts from 0.
    return replace(named[0].device, torch_device="cuda:0")


def _is_named(card: Card, mask: str) -> bool:
    if mask == str(card.index):
        return True
    return bool(mask) and card.device is not None and card.device.uuid.startswith(mask)


def _card(nvml: ModuleType, index: int, platform: str) -> Card:
    try:
        handle = library.handle_at(nvml, index)
        name, uuid = library.name_and_uuid(nvml, handle)
        memory = library.total_memory(nvml, handle)
        if library.mig_is_on(nvml, handle):
            mend = f"nvidia-smi -i {index} -mig 0 makes it one again"
            return Card(index, None, problem=f"{name}: MIG cuts it into instances; {mend}")
    except DeviceFault as fault:
        return Card(index, None, problem=str(fault))
    if memory is None:
        return Card(index, None, problem=f"{name}: the driver doesn't say how much memory it has")
    kind = GpuClass(class_name(name, platform), whole_gigabytes(memory))
    device = Device(uuid, f"cuda:{index}", kind)
    try:
        vitals = library.read_vitals(nvml, handle)
        return Card(index, device, vitals, _too_old(nvml, handle, name))
    except DeviceFault as fault:
        gone = fault.kind is DeviceFaultKind.CONTEXT_LOST
        return Card(index, None if gone else device, Vitals(memory), str(fault))


def _too_old(nvml: ModuleType, handle: object, name: str) -> str:
    capability, cuda = library.compute_capability(nvml, handle), library.driver_cuda(nvml)
    if capability is not None and capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        return f"{name} is of compute capability {have}: {TORCH} is built for {least} and later"
    if cuda is not None and cuda < LEAST_CUDA:
        have, least = (f"{each // 1000}.{each % 1000 // 10}" for each in (cuda, LEAST_CUDA))
        return f"the driver is for CUDA {have}: update it, {TORCH} is built for {least}"
    return ""
