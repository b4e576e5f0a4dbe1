"""What a benchmark prints: one JSON object, its figures beside the machine that they hold for.

    {"benchmark": "warm_pool", "loads": 31, …, "machine": {"device": "cpu", …}}

Nothing but that object goes to standard output with `--json`; without it, lines for a person.
Torch is imported only for a CUDA device, so that the report itself costs nothing, and after the
claim of the card.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TextIO

from benchmarks.card import as_torch_has_it
from cluster.core.errors import DeviceFault
from cluster.core.types import GigaBytes
from cluster.inference import devices
from cluster.inference.devices import Device

Figure = int | float | str | None
"""None: not measured on this machine."""

PACKAGES: Final = ("torch", "diffusers", "transformers", "numpy")
CPU_INFO: Final = Path("/proc/cpuinfo")
PLATFORM: Final = "bench"


def arguments(description: str) -> argparse.ArgumentParser:
    """`--json` and `--device auto|cpu|cuda[:N]`; a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser


def claimed(asked: str, environment: MutableMapping[str, str]) -> Device:
    """The device of this process. `auto` is the first card, or the one that the environment's mask
    names, else the CPU. Call before torch is first imported. Ends the process where it isn't there.

    Without `pynvml` the number counts the cards that CUDA shows this process.
    """
    kind, _, number = asked.partition(":")
    if (
        kind not in ("auto", "cpu", "cuda")
        or number
        and not (kind == "cuda" and number.isdecimal())
    ):
        sys.exit(f"error: --device {asked}: not auto, cpu, cuda or cuda:N")
    if kind != "cpu" and not _has_nvml():
        devices.prepare(environment)
        if (found := as_torch_has_it(int(number or 0), PLATFORM)) is not None:
            return found
    try:
        if kind == "cpu" or kind == "auto" and not devices.list_gpus(PLATFORM):
            devices.prepare(environment)
            return devices.simulated(0, f"CPU+{PLATFORM}", GigaBytes(16))
        environment[devices.MASK] = number or environment.get(devices.MASK, "0")
        return devices.claim(PLATFORM, environment)
    except DeviceFault as fault:
        sys.exit(f"error: --device {asked}: {fault}")


def _has_nvml() -> bool:
    try:
        importlib.import_module("pynvml")
    except ImportError:
        return False
    return True


def progress(text: str) -> None:
    """To standard error, where it spoils no JSON."""
    print(text, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, object]:
    """Facts that figures depend on. `cpus` counts those that this process may use."""
    return {
        "device": device,
        "device_name": _cpu_name() if device == "cpu" else _cuda_name(device),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def publish(
    benchmark: str,
    figures: Mapping[str, Figure],
    device: str,
    as_json: bool,
    out: TextIO | None = None,
) -> None:
    """Raises `ValueError` for a figure that is no number: a benchmark that failed has none."""
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    facts = machine(device)
    stream = out or sys.stdout
    if as_json:
        report = {"benchmark": benchmark, **figures, "machine": facts}
        print(json.dumps(report), file=stream)
        return
    print(f"{benchmark} on {facts['device_name']} ({facts['cpus']} CPUs)", file=stream)
    width = max(map(len, figures), default=0)
    for name, value in figures.items():
        print(f"  {name:<{width}}  {_readable(value)}", file=stream)


def _readable(value: Figure) -> str:
    if value is None:
        return "not measured here"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cuda_name(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_name(device))
