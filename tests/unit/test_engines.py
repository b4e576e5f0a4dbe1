"""How a card's process begins: the card is claimed, and only then is torch imported.

Libraries that come with torch begin CUDA as they are imported, and a CUDA that was begun heeds no
mask. So the first import of torch is made to end the process, which says how things stand then.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.inference import devices

AT_THE_FIRST_TORCH = """
import json, os, sys
from tests.unit.fake_nvml import FakeCard, FakeNvml

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            print(json.dumps(dict(os.environ)))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.modules["pynvml"] = FakeNvml(FakeCard(), FakeCard(uuid="GPU-2222"))
"""
ENGINE = """
from cluster import engines, logs
from cluster.core.types import GpuClass
import actors.inference
settings = engines.EngineSettings(None, "docker", 1, (), logs.Settings("info", "json"))
engines.engine_factory(settings, %s)()
"""
BENCHMARK = """
sys.argv = ["engine_overhead", "--device", "cuda:1"]
from benchmarks import engine_overhead
engine_overhead.main()
"""


def environment_at_the_first_torch(program: str) -> dict[str, str]:
    said = subprocess.run(
        [sys.executable, "-c", AT_THE_FIRST_TORCH + program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), devices.MASK: "1"},
    )
    found: dict[str, str] = json.loads(said.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("program", "mask"),
    [(ENGINE % "None", "GPU-2222"), (BENCHMARK, "GPU-2222"), (ENGINE % "GpuClass('A+b', 8)", "1")],
    ids=["card", "benchmark", "simulated"],
)
def test_before_torch_is_imported_the_card_is_claimed(program: str, mask: str) -> None:
    found = environment_at_the_first_torch(program)
    assert found[devices.MASK] == mask
    assert devices.SURROUNDINGS.items() <= found.items()
