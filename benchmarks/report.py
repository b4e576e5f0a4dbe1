"""What every benchmark prints: one JSON object with its figures and where they come from."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version


def machine(device: str) -> dict[str, object]:
    """The surroundings that figures depend on."""
    return {
        "device": device,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def show(figures: Mapping[str, object], device: str, as_json: bool) -> None:
    """One JSON object on a line, or a figure a line for a person."""
    everything = {**figures, "machine": machine(device)}
    if as_json:
        print(json.dumps(everything))
        return
    for name, value in everything.items():
        print(f"{name:24} {value}")


def progress(text: str) -> None:
    """To stderr, so that the output stays one JSON object."""
    print(text, file=sys.stderr, flush=True)
