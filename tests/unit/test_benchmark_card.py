"""The card that a benchmark names is the one that torch computes on; what is carried to it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report


def test_without_nvml_a_card_is_described_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is where the machine has torch and little else."""
    cards = [
        SimpleNamespace(name="NVIDIA L4", uuid="3-4", total_memory=24 * 10**9),
        SimpleNamespace(name="NVIDIA H100 80GB HBM3", uuid="1-2", total_memory=85 * 10**9),
    ]
    cuda = SimpleNamespace(get_device_properties=cards.__getitem__, device_count=lambda: len(cards))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    environment = {"CUDA_VISIBLE_DEVICES": "3,1"}
    named = report.claimed("cuda:1", environment)
    assert named.gpu_class.name == "NVIDIA H100 80GB HBM3+bench"
    assert named.gpu_class.vram == 80
    assert (named.torch_device, named.uuid, named.simulated) == ("cuda:1", "GPU-1-2", False)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,1", "by which torch counts"
    assert report.claimed("auto", {}).torch_device == "cuda:0"
    with pytest.raises(SystemExit, match="error: --device cuda:2"):
        report.claimed("cuda:2", {})


def test_what_is_carried_is_in_the_lock() -> None:
    root = Path(__file__).parents[2]
    script = (root / "benchmarks" / "on_gpu.sh").read_text(encoding="utf-8")
    (carried,) = re.findall(r"^LACKING=\(([^)]*)\)", script, re.MULTILINE)
    lock = (root / "requirements" / "worker.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z0-9_.-]+)==", lock, re.MULTILINE))
    assert set(carried.split()) <= pinned
    assert {"diffusers", "transformers", "compel", "pydantic", "pydantic-core"} <= {
        *carried.split()
    }
