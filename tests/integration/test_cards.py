"""On the devices that this machine has: the CPU always, an NVIDIA card where there is one.

What can only be seen on a card is skipped without one, and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.core.errors import DeviceFault, DeviceFaultKind
from cluster.core.ports import Order
from cluster.core.types import AttemptId, Commitment, TaskType
from cluster.inference import canary, cuda, devices
from cluster.inference.devices import Device
from cluster.inference.engine import Engine, Limits
from cluster.inference.packing import ROW, Packing, sums
from cluster.inference.parts import tensors
from cluster.inference.pool import MeasuredBudget, release_memory, release_pinned
from cluster.models.store import ModelStore
from devnet.models import INVERSION_TOKEN, LLM, SD15, SD15_INVERSION, SD15_LORA, SDXL, SDXL_REFINER
from tests.integration.card_world import DEVICES, device_of, needs_card
from tests.integration.test_engine_features import controlled

SMALL = Limits(device_bytes=3 * 2**20, threads=1)
"""Room for less than one tiny pipeline: every change of model is a round trip."""

TASKS: dict[str, dict[str, Any]] = {
    "plain": {"base_model": SD15[0]},
    "lora": {"base_model": SD15[0], "lora": {"model": SD15_LORA, "weight": 60}},
    "half": {"base_model": SD15[1], "dtype": "float16"},
    "brain": {"base_model": SD15[1], "dtype": "bfloat16"},
    "controlled": {"base_model": SD15[0], "controlnet": controlled()},
    "inverted": {
        "base_model": SD15[0],
        "prompt": f"a {INVERSION_TOKEN} cat",
        "textual_inversion": SD15_INVERSION,
    },
    "refined": {"base_model": SDXL, "refiner": {"model": SDXL_REFINER, "steps": 3}},
    "text": {"model": LLM, "generation_config": {"max_new_tokens": 12, "do_sample": True}},
    # The running sum that this needs has to have a deterministic form on the card.
    "nucleus": {
        "model": LLM,
        "generation_config": {"max_new_tokens": 12, "do_sample": True, "top_p": 0.7},
    },
    "beams": {"model": LLM, "generation_config": {"max_new_tokens": 12, "num_beams": 3}},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    f"{bits} bits": TASKS["text"] | {"quantize_bits": bits} for bits in (4, 8)
}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return device_of(request.param)


@pytest.fixture
def card() -> Device:
    return device_of("cuda")


def order(name: str) -> Order:
    task = dict((TASKS | QUANTIZED)[name])
    if "model" in task:
        kind, task = TaskType.LLM, task | {"messages": [{"role": "user", "content": "a cat?"}]}
    else:
        config = {"image_width": 64, "image_height": 64, "steps": 3, "num_images": 2, "seed": 9}
        kind, task = TaskType.SD, {"prompt": "a cat", "task_config": config} | task
    return Order(AttemptId(name), Commitment("0x01"), kind, json.dumps(task), None)


def score(engine: Engine, name: str) -> str:
    made = engine.run(order(name), lambda: False, lambda _step, _steps: None)
    return made.score.hex() + "".join(content.hex() for _, content in made.files)


def engine_on(device: Device, root: Path, limits: Limits = Limits(threads=1)) -> Engine:  # noqa: B008
    return Engine(device, ModelStore(root), time.time, limits)


def test_the_same_bits_cold_warm_and_after_every_other_task(
    device: Device, tiny_models: Path
) -> None:
    cold = {name: score(engine_on(device, tiny_models), name) for name in TASKS}
    warm, small = engine_on(device, tiny_models), engine_on(device, tiny_models, SMALL)
    for names in (tuple(TASKS), tuple(reversed(TASKS))):
        assert {name: score(warm, name) for name in names} == cold
        assert {name: score(small, name) for name in names} == cold
    assert small.counts.left_device > 0


def test_the_same_bits_in_another_process(device: Device, tiny_models: Path) -> None:
    program = f"from {__name__} import elsewhere; elsewhere(*__import__('sys').argv[1:])"
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, device.torch_device, str(tiny_models)],
        capture_output=True,
        text=True,
        check=True,
    )
    here = engine_on(device, tiny_models)
    assert json.loads(said.stdout) == {name: score(here, name) for name in ("plain", "text")}


def elsewhere(torch_device: str, root: str) -> None:
    """What the other process does."""
    engine = engine_on(device_of("cpu" if torch_device == "cpu" else "cuda"), Path(root))
    print(json.dumps({name: score(engine, name) for name in ("plain", "text")}))


@needs_card
def test_the_card_is_the_one_that_cuda_means(card: Device) -> None:
    properties = torch.cuda.get_device_properties(torch.device(card.torch_device))
    assert card.uuid.removeprefix("GPU-") == str(properties.uuid)
    assert card.gpu_class.name == f"{properties.name}+test"
    memory = devices.vitals(card.uuid).total_memory
    assert memory is not None
    # What the driver keeps for itself grows with the card.
    assert abs(memory - properties.total_memory) < memory / 20


@needs_card
def test_the_budget_is_measured_and_shrinks_with_what_others_take(
    card: Device, tiny_models: Path
) -> None:
    score(engine_on(card, tiny_models, Limits(threads=1)), "plain")
    budget = MeasuredBudget(torch.device(card.torch_device))
    unknown = budget()
    budget.computed(2**20)
    known = budget()
    hog = torch.empty(2**28, dtype=torch.uint8, device=card.torch_device)
    assert unknown < known <= torch.cuda.mem_get_info(0)[1]
    assert budget() <= known + 2**21, "what our own process holds is still ours to give"
    del hog


@needs_card
def test_out_of_memory_is_typed_and_the_card_goes_on(card: Device, tiny_models: Path) -> None:
    engine = engine_on(card, tiny_models)
    before = score(engine, "plain")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(0)
    # Room for all that computes a small image, libraries' own workspaces among it.
    hog = torch.empty(max(free - 2**28, 1), dtype=torch.uint8, device=card.torch_device)
    large = order("plain")
    task = json.loads(large.parameters)
    task["task_config"] |= {"image_width": 4096, "image_height": 4096, "num_images": 1}
    large = Order(large.attempt_id, large.task, large.task_type, json.dumps(task), None)
    with pytest.raises(DeviceFault) as caught:
        engine.run(large, lambda: False, lambda _step, _steps: None)
    assert caught.value.kind is DeviceFaultKind.OUT_OF_MEMORY
    del hog
    torch.cuda.empty_cache()
    assert score(engine, "plain") == before


@needs_card
def test_copies_that_wait_in_host_memory_are_pinned(card: Device, tiny_models: Path) -> None:
    engine = engine_on(card, tiny_models, SMALL)
    for name in ("plain", "half"):
        score(engine, name)
    copies = [copy for part in engine._pool._parts.values() for copy in part.host or ()]
    assert copies
    assert all(copy.is_pinned() for copy in copies if copy.numel())


@needs_card
@pytest.mark.skipif(
    not hasattr(torch.accelerator, "empty_host_cache"),
    reason="an older torch keeps what it pinned",
)
def test_what_is_pinned_is_what_the_copies_are_counted_as(card: Device, tiny_models: Path) -> None:
    def pinned() -> int:
        release_memory()
        release_pinned()
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])

    score(engine_on(card, tiny_models), "plain")  # what torch pins for itself
    before = pinned()
    engine = engine_on(card, tiny_models, SMALL)
    for name in ("plain", "half", "text"):
        score(engine, name)
    counted = engine.usage().host_bytes
    assert counted > 2**20
    assert abs(pinned() - before - counted) < 2**16
    engine.distrust()
    assert abs(pinned() - before) < 2**16


@needs_card
def test_a_checksum_is_the_same_on_a_card_as_on_the_cpu(card: Device) -> None:
    numbers = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**63), 2**63 - 1, (5 * ROW + 77,), generator=numbers)
    assert sums(words.to(card.torch_device)[:].view(torch.uint8)) == sums(words.view(torch.uint8))
    module: Any = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(300, 301))
    module = module.half().to(memory_format=torch.channels_last)
    packing = Packing.of(module, torch.device(card.torch_device))
    here = packing.digest(tensors(module))
    assert packing.digest(tensors(module.to(card.torch_device))) == here


def test_a_bit_that_flips_on_the_device_is_found_by_the_canary(
    device: Device, tiny_models: Path
) -> None:
    engine = engine_on(device, tiny_models)
    expected = {name: score(engine, name) for name in ("plain", "half", "text")}
    asked = replace(order("plain"), task=canary.TASK)
    assert engine.run(asked, lambda: False, lambda _step, _steps: None)
    for part in engine._pool._parts.values():
        largest = max(part.module.parameters(), key=lambda each: each.numel())
        largest.data.view(torch.uint8).view(-1)[1] ^= 1
    with pytest.raises(DeviceFault) as caught:
        engine.run(asked, lambda: False, lambda _step, _steps: None)
    assert caught.value.kind is DeviceFaultKind.MEMORY_CHANGED
    assert engine.usage().device_bytes == 0
    assert {name: score(engine, name) for name in expected} == expected


@needs_card
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes isn't installed")
def test_what_is_quantized_on_the_card_gives_the_same_bits(card: Device, tiny_models: Path) -> None:
    cold = {name: score(engine_on(card, tiny_models), name) for name in QUANTIZED}
    assert len({*cold.values(), score(engine_on(card, tiny_models), "text")}) == 3
    small = engine_on(card, tiny_models, SMALL)
    asked = replace(order("plain"), task=canary.TASK)
    for name in ("plain", *QUANTIZED, "text", *reversed(QUANTIZED), "half", *QUANTIZED):
        assert score(small, name) == cold.get(name, score(small, name))
        assert small.run(asked, lambda: False, lambda _step, _steps: None), "nothing looks changed"


def _in_a_process(program: str, tiny_models: Path) -> str:
    """The last line that it prints; it sees the last of the machine's cards, as by Ray."""
    number = str(len(devices.list_gpus("test")) - 1)
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tiny_models)],
        capture_output=True,
        text=True,
        env=os.environ | {devices.MASK: number},
    )
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()[-1]


MADE = """
import sys
from cluster import engines, logs
from cluster.models.settings import StoreSettings
from pathlib import Path
said = logs.Settings("error", "json")
root = Path(sys.argv[1])
settings = engines.EngineSettings(StoreSettings(root=root), "test", 2**30, (), said)
mounted = engines.engine_factory(settings, None)()
"""


@needs_card
def test_an_actors_process_computes_on_the_card_that_it_claims(tiny_models: Path) -> None:
    program = f"{MADE}import torch\nprint(mounted.uuid, torch.cuda.device_count())"
    assert _in_a_process(program, tiny_models) == f"{devices.list_gpus('test')[-1].uuid} 1"


POISONED = f"""{MADE}
import os
import torch
from {__name__} import order
from cluster.inference import engine

def make_images(*_):
    table = torch.zeros(4, device="cuda:0")
    table[torch.tensor([9], device="cuda:0")].sum().item()

engine.make_images = make_images
try:
    mounted.engine.run(order("plain"), lambda: False, lambda _step, _steps: None)
except Exception as error:
    print(type(error).__name__, error.kind.name, flush=True)
os._exit(0)  # torch puts away nothing in a context that is lost
"""


@needs_card
def test_a_context_that_a_kernel_broke_is_lost(tiny_models: Path) -> None:
    assert _in_a_process(POISONED, tiny_models) == "DeviceFault CONTEXT_LOST"


@needs_card
def test_a_card_short_of_memory_counts_it(card: Device) -> None:
    """On this the engine relies to know that cuDNN made do with less."""
    where = torch.device(card.torch_device)
    before = cuda.shortages(where)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(torch.cuda.mem_get_info(where)[1] * 2, dtype=torch.uint8, device=where)
    assert cuda.shortages(where) == before + 1
