"""Whether files of weights hold numbers at all, asked when a result of theirs holds none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open


def first_broken(files: Iterable[Path], check: Callable[[], None]) -> Path | None:
    """The first of the safetensors files that holds something that isn't a finite number; None
    where there is none. `check` is called between tensors, and may raise."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as weights:
            for name in weights.keys():  # noqa: SIM118 - it isn't a mapping
                check()
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not _finite(tensor):
                    return file
    return None


def _finite(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    return bool(torch.isfinite(wide).all())
