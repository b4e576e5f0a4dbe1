"""Whether files of weights hold numbers to compute with, asked when a result holds none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

MOST: Final = 65504.0
"""The largest number in 16 bits. Products of larger ones overflow on any card, soon even in 32."""


def first_broken(files: Iterable[Path], check: Callable[[], None]) -> Path | None:
    """The first of the safetensors files that holds something that isn't a finite number, or one
    beyond `MOST`; None where there is none. `check` is called between tensors, and may raise."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as weights:
            for name in weights.keys():  # noqa: SIM118 - it isn't a mapping
                check()
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not _sane(tensor):
                    return file
    return None


def _sane(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return bool((wide.abs() <= MOST).all())
