"""What benchmarks print."""

from __future__ import annotations

import io
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import report
from cluster.inference import devices
from tests.unit.fake_nvml import FakeCard, FakeNvml


def published(as_json: bool, **figures: report.Figure) -> str:
    out = io.StringIO()
    report.publish("sample", figures, "cpu", as_json, out)
    return out.getvalue()


def test_one_json_object() -> None:
    text = published(True, loads=31, ratio_seconds=0.25, card=None)
    assert text.count("\n") == 1
    made = json.loads(text)
    assert made["benchmark"] == "sample"
    figures = {name: made[name] for name in ("loads", "ratio_seconds", "card")}
    assert figures == {"loads": 31, "ratio_seconds": 0.25, "card": None}
    machine = made["machine"]
    assert machine["device"] == "cpu"
    assert machine["torch"] == version("torch")
    assert machine["diffusers"] == version("diffusers")
    assert 1 <= machine["cpus"] <= (os.cpu_count() or 1)
    assert machine["cpu"] == machine["device_name"] != ""


def test_lines_for_a_person() -> None:
    lines = published(False, loads=31, ratio_seconds=0.123456, card=None).splitlines()
    assert lines[0].startswith("sample on ")
    assert [line.split(maxsplit=1) for line in lines[1:]] == [
        ["loads", "31"],
        ["ratio_seconds", "0.1235"],
        ["card", "not measured here"],
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_printed(value: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        published(True, seconds=value)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package"))
    assert report.machine("cpu")["no-such-package"] is None


@pytest.mark.parametrize(
    ("content", "name"),
    [("processor : 0\nmodel name\t: A CPU @ 2 GHz\n", "A CPU @ 2 GHz"), ("processor : 0\n", None)],
)
def test_the_cpus_name(
    content: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(content)
    monkeypatch.setattr(report, "CPU_INFO", file)
    found = report.machine("cpu")["cpu"]
    assert found == name if name else found


def test_arguments_and_the_cpu_without_torch() -> None:
    chosen = report.arguments("measures").parse_args(["--json", "--device", "cpu"])
    environment: dict[str, str] = {}
    assert chosen.json
    assert report.claimed(chosen.device, environment).torch_device == "cpu"
    assert environment == devices.SURROUNDINGS
    assert report.arguments("measures").parse_args([]).device == "auto"


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = FakeNvml(FakeCard(), FakeCard(uuid="GPU-2222"))
    monkeypatch.setitem(sys.modules, "pynvml", cards)


@pytest.mark.parametrize("asked", ["gpu", "cuda:x", "cuda:-1", "cuda:7", "cpu:1", "auto:1"])
@pytest.mark.usefixtures("two_cards")
def test_a_device_that_is_not_there(asked: str) -> None:
    with pytest.raises(SystemExit, match="error: --device"):
        report.claimed(asked, {})


@pytest.mark.parametrize(
    ("asked", "mask", "uuid"),
    [
        ("cuda", None, "GPU-1111"),
        ("auto", None, "GPU-1111"),
        ("auto", "1", "GPU-2222"),
        ("cuda:1", None, "GPU-2222"),
        ("cuda:1", "0", "GPU-2222"),
    ],
)
@pytest.mark.usefixtures("two_cards")
def test_the_card_that_was_asked_for_is_claimed(asked: str, mask: str | None, uuid: str) -> None:
    environment = {} if mask is None else {devices.MASK: mask}
    device = report.claimed(asked, environment)
    assert (device.uuid, device.torch_device) == (uuid, "cuda:0")
    assert environment[devices.MASK] == uuid


def test_without_a_card_auto_is_the_cpu_and_cuda_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(report, "as_torch_has_it", lambda _number, _platform: None)
    assert report.claimed("auto", {}).torch_device == "cpu"
    with pytest.raises(SystemExit, match="nvidia-ml-py"):
        report.claimed("cuda", {})
