from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.types import GpuClass
from cluster.inference import devices
from cluster.inference.devices import Card, Device, visible
from cluster.inference.nvml import NoDriver, Vitals
from tests.unit.fake_nvml import GIB, FakeCard, FakeNvml, error

KIND = GpuClass("NVIDIA GeForce RTX 4090+docker", devices.whole_gigabytes(24 * GIB))
FIRST = Device("GPU-1111", "cuda:0", KIND)
HEALTHY = Vitals(24 * GIB, 20 * GIB, 41, 0, 0, ())


def two_cards(**second: Any) -> FakeNvml:
    return FakeNvml(FakeCard(), FakeCard(uuid="GPU-2222", **second))


# --- what there is --------------------------------------------------------------------------------


def test_a_card_as_the_network_will_see_it() -> None:
    nvml = FakeNvml(FakeCard())
    assert devices.survey("docker", nvml) == (Card(0, FIRST, HEALTHY),)
    assert devices.list_gpus("docker", nvml) == (FIRST,)
    assert nvml.open == 0


def test_an_older_librarys_bytes_are_text() -> None:
    nvml = FakeNvml(FakeCard(name=b"NVIDIA L4", uuid=b"GPU-3"))
    (card,) = devices.list_gpus("linux", nvml)
    assert (card.gpu_class.name, card.uuid) == ("NVIDIA L4+linux", "GPU-3")


@pytest.mark.parametrize(("mib", "gb"), [(24564, 24), (81559, 80), (8188, 8), (8193, 9), (1, 1)])
def test_memory_is_counted_as_the_network_counts_it(mib: int, gb: int) -> None:
    assert devices.whole_gigabytes(mib * devices.MIB) == gb


@pytest.mark.parametrize("why", ["LibraryNotFound", "DriverNotLoaded"])
def test_without_a_driver_there_are_no_cards(why: str) -> None:
    nvml = FakeNvml(FakeCard(), init=error(why))
    assert devices.list_gpus("docker", nvml) == ()
    with pytest.raises(NoDriver, match="no NVIDIA driver"):
        devices.survey("docker", nvml)


def test_without_the_extra_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices.list_gpus("docker") == ()
    with pytest.raises(NoDriver, match="nvidia-ml-py is not installed"):
        devices.survey("docker")


def test_the_installed_library_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeCard()))
    assert devices.list_gpus("docker") == (FIRST,)


def test_a_driver_that_fails_is_not_taken_for_none() -> None:
    nvml = FakeNvml(FakeCard(), init=error("LibRmVersionMismatch"))
    with pytest.raises(DeviceFault, match="NVML doesn't start"):
        devices.list_gpus("docker", nvml)


@pytest.mark.parametrize("where", ["handle", "name", "uuid", "memory"])
@pytest.mark.parametrize("what", ["GpuIsLost", "Unknown"])
def test_a_card_that_cant_be_known_hides_no_other(where: str, what: str) -> None:
    nvml = FakeNvml(FakeCard(), FakeCard(**{where: error(what)}), FakeCard(uuid="GPU-3"))
    first, lost, third = devices.survey("docker", nvml)
    assert (lost.index, lost.device) == (1, None)
    assert lost.problem
    assert first.device is not None
    assert third.device is not None
    assert third.device.torch_device == "cuda:2"
    assert [card.uuid for card in devices.list_gpus("docker", nvml)] == ["GPU-1111", "GPU-3"]


def test_a_card_of_unknown_size_is_of_no_class() -> None:
    (card,) = devices.survey("docker", FakeNvml(FakeCard(memory=error("NotSupported"))))
    assert card.device is None
    assert "how much memory" in card.problem


def test_a_card_that_is_cut_into_instances_isnt_declared_whole() -> None:
    nvml = two_cards(mig=[1, 1])
    first, cut = devices.survey("docker", nvml)
    assert (first.problem, cut.device) == ("", None)
    assert cut.problem.endswith("nvidia-smi -i 1 -mig 0 makes it one again")
    assert devices.list_gpus("docker", nvml) == (FIRST,)
    with pytest.raises(DeviceFault, match="MIG"):
        devices.claim("docker", {"CUDA_VISIBLE_DEVICES": "1"}, nvml)


@pytest.mark.parametrize("pending", [(0, 1), (0, 0), error("NotSupported")])
def test_a_card_that_is_whole_now_is_one(pending: Any) -> None:
    assert devices.list_gpus("docker", FakeNvml(FakeCard(mig=pending))) == (FIRST,)


@pytest.mark.parametrize(
    ("capability", "cuda", "says"),
    [
        ((7, 5), 13000, ""),
        ((12, 1), 13020, ""),
        (error("NotSupported"), error("FunctionNotFound"), ""),
        ((7, 0), 13000, "is of compute capability 7.0: torch 2.13 is built for 7.5 and later"),
        ((8, 0), 12090, "the driver is for CUDA 12.9: update it, torch 2.13 is built for 13.0"),
    ],
)
def test_a_card_or_a_driver_too_old_for_torch_is_told(
    capability: Any, cuda: Any, says: str
) -> None:
    (card,) = devices.survey("docker", FakeNvml(FakeCard(capability=capability), cuda=cuda))
    assert card.device == FIRST, "another build of torch may well use it"
    assert card.problem.endswith(says)
    assert bool(card.problem) == bool(says)


def test_the_wheel_is_the_one_that_is_installed() -> None:
    assert version("torch").startswith(f"{devices.TORCH.removeprefix('torch ')}.")


# --- how a card does ------------------------------------------------------------------------------


def test_vitals_are_those_of_the_card_named() -> None:
    second = SimpleNamespace(total=24 * GIB, free=GIB)
    nvml = two_cards(memory=second, temperature=88, corrected=3, uncorrected=1, reasons=0x61)
    found = devices.vitals("GPU-2222", nvml)
    assert (found.free_memory, found.temperature) == (GIB, 88)
    assert (found.ecc_corrected, found.ecc_uncorrected) == (3, 1)
    assert found.throttling == ("thermal slowdown by the driver", "thermal slowdown by the card")
    assert devices.vitals("GPU-1111", nvml) == HEALTHY
    assert nvml.open == 0


@pytest.mark.parametrize("why", ["NotSupported", "FunctionNotFound", "NoPermission"])
@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ("memory", {"total_memory", "free_memory"}),
        ("temperature", {"temperature"}),
        ("corrected", {"ecc_corrected"}),
        ("uncorrected", {"ecc_uncorrected"}),
        ("reasons", {"throttling"}),
    ],
)
def test_what_the_driver_doesnt_say_is_none(value: str, fields: set[str], why: str) -> None:
    found = devices.vitals("GPU-1111", FakeNvml(FakeCard(**{value: error(why)})))
    unknown = {name for name in Vitals.__slots__ if getattr(found, name) is None}
    assert unknown == fields


@pytest.mark.parametrize("events", [True, False])
def test_an_older_driver_says_by_another_name_what_slows_it(events: bool) -> None:
    nvml = FakeNvml(FakeCard(reasons=0x4), events=events)
    assert devices.vitals("GPU-1111", nvml).throttling == ("power cap",)


@pytest.mark.parametrize("reasons", [0x0, 0x1, 0x2, 0x100])
def test_an_idle_card_isnt_throttled(reasons: int) -> None:
    assert devices.vitals("GPU-1111", FakeNvml(FakeCard(reasons=reasons))).throttling == ()


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("GpuIsLost", DeviceFaultKind.CONTEXT_LOST),
        ("Timeout", DeviceFaultKind.OTHER),
        ("Unknown", DeviceFaultKind.OTHER),
    ],
)
@pytest.mark.parametrize("where", ["handle", "memory", "temperature", "uncorrected", "reasons"])
def test_a_failure_is_the_devices_fault_by_its_type(
    where: str, what: str, kind: DeviceFaultKind
) -> None:
    nvml = FakeNvml(FakeCard(**{where: error(what)}))
    with pytest.raises(DeviceFault) as caught:
        devices.vitals("GPU-1111", nvml)
    assert caught.value.kind is kind
    assert nvml.open == 0


def test_no_card_has_that_uuid() -> None:
    with pytest.raises(DeviceFault) as caught:
        devices.vitals("GPU-9", FakeNvml(FakeCard()))
    assert caught.value.kind is DeviceFaultKind.CONTEXT_LOST


def test_a_card_without_a_thermometer_can_still_be_used() -> None:
    (card,) = devices.survey("docker", FakeNvml(FakeCard(temperature=error("Unknown"))))
    assert card.device == FIRST
    assert "NVML fails" in card.problem
    (card,) = devices.survey("docker", FakeNvml(FakeCard(temperature=error("GpuIsLost"))))
    assert card.device is None


# --- one process, one card ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "uuid"), [("0", "GPU-1111"), ("1", "GPU-2222"), ("GPU-2222", "GPU-2222")]
)
def test_a_process_claims_the_card_that_ray_gave_it(mask: str, uuid: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": mask}
    device = devices.claim("docker", environment, two_cards())
    assert (device.uuid, device.torch_device) == (uuid, "cuda:0")
    # CUDA may number the cards in another order than NVML: from here on it goes by the UUID.
    assert environment == {"CUDA_VISIBLE_DEVICES": uuid, **devices.SURROUNDINGS}


def test_the_only_card_needs_no_mask() -> None:
    environment: dict[str, str] = {}
    assert devices.claim("docker", environment, FakeNvml(FakeCard())).uuid == "GPU-1111"


@pytest.mark.parametrize("mask", [None, "", "2", "0,1", "GPU-", "GPU-3"])
def test_a_mask_that_names_no_one_card_is_refused(mask: str | None) -> None:
    with pytest.raises(DeviceFault, match="one card is wanted"):
        visible(devices.survey("docker", two_cards()), mask)


def test_a_lost_card_moves_no_other_ones_number() -> None:
    nvml = FakeNvml(FakeCard(handle=error("GpuIsLost")), FakeCard(uuid="GPU-2222"))
    assert devices.claim("docker", {"CUDA_VISIBLE_DEVICES": "1"}, nvml).uuid == "GPU-2222"
    with pytest.raises(DeviceFault, match="the card is gone"):
        devices.claim("docker", {"CUDA_VISIBLE_DEVICES": "0"}, nvml)


def test_without_a_driver_nothing_is_claimed() -> None:
    with pytest.raises(DeviceFault, match="no NVIDIA driver"):
        devices.claim("docker", {}, FakeNvml(init=error("DriverNotLoaded")))


@pytest.mark.parametrize(("cores", "share"), [(64, 8), (10, 5), (3, 1), (1, 1)])
def test_a_cards_share_of_the_cores(cores: int, share: int) -> None:
    assert devices.share_of_cores(cores, two_cards()) == share


# --- the CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "uuid"), [("auto", "GPU-1111"), ("cuda", "GPU-1111"), ("cpu", "cpu")]
)
def test_the_cpu_is_used_where_it_is_asked_for(
    asked: Literal["auto", "cuda", "cpu"], uuid: str
) -> None:
    assert devices.choose(asked, "docker", FakeNvml(FakeCard())).uuid == uuid


def test_the_cpu_stands_in_only_for_whom_any_will_do() -> None:
    assert devices.choose("auto", "linux", FakeNvml()).gpu_class.name == "CPU+linux"
    with pytest.raises(DeviceFault):
        devices.choose("cuda", "linux", FakeNvml())
    device = devices.cpu("linux")
    assert (device.torch_device, device.simulated) == ("cpu", False)
    assert device.gpu_class.vram > 0
