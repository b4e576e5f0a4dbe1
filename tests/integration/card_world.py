"""What tests of the engine share: the tiny models, and the devices that this machine has.

Nothing here needs more than the engine does, so that its tests run by themselves where there is a
card and little else: `pytest --noconftest -p tests.integration.card_world` (benchmarks/on_gpu.sh).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cluster.core.types import GigaBytes
from cluster.inference import devices
from cluster.inference.devices import Device
from devnet.models import make_models

needs_card = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("pynvml") is None,
    reason="no NVIDIA card on this machine, or the package's extra gpu isn't installed",
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_card)]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all tiny models; what spoils one works on a copy."""
    root = tmp_path_factory.mktemp("tiny-models")
    make_models(root)
    return root


def device_of(kind: str) -> Device:
    """A simulated card for `cpu`, this machine's first one for `cuda`."""
    if kind == "cpu":
        return devices.simulated(0, "CPU+test", GigaBytes(8))
    return devices.list_gpus("test")[0]
