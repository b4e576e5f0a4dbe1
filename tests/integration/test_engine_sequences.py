"""The same task, the same bits: whatever ran before it, and wherever its models came from. On the
CPU, and on an NVIDIA card where there is one."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.core.errors import ClusterError
from cluster.core.ports import Order
from cluster.core.types import AttemptId, Commitment, TaskType
from cluster.inference.devices import Device
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet.models import (
    INVERSION_TOKEN,
    LLM,
    SD2,
    SD15,
    SD15_CONTROLNET,
    SD15_FLAGS_ALL,
    SD15_INVERSION,
    SD15_LORA,
    SD15_LORA_KOHYA,
    SD15_VAE,
    SDXL,
    SDXL_LORA,
    SDXL_REFINER,
)
from tests.integration.card_world import DEVICES, device_of

SMALLEST, LARGEST = 3 * 2**20, 40 * 2**20
"""Bytes for a tier: from less than one tiny pipeline to all of them."""

_FILE = io.BytesIO()
Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(_FILE, "PNG")
PICTURE = "data:image/png;base64," + base64.b64encode(_FILE.getvalue()).decode()

OLD = "org/old"
"""Its scheduler has settings that diffusers mends as it makes some pipelines, and others not."""

TASKS: dict[str, dict[str, Any]] = {
    "a": {"base_model": SD15[0]},
    "a, weighted": {"base_model": SD15[0], "prompt": "a (red cat)1.3 in the forest"},
    "a, long": {"base_model": SD15[0], "prompt": "a cat in the forest, " * 30},
    "a, lora": {"base_model": SD15[0], "lora": {"model": SD15_LORA, "weight": 60}},
    "a, bfloat16": {"base_model": SD15[0], "dtype": "bfloat16"},
    "a, euler": {
        "base_model": SD15[0],
        "scheduler": {"method": "EulerAncestralDiscreteScheduler"},
    },
    "b": {"base_model": SD15[1]},
    "b, lcm": {"base_model": SD15[1], "scheduler": {"method": "LCMScheduler"}},
    "xl": {"base_model": SDXL},
    "xl, lora": {"base_model": SDXL, "lora": {"model": SDXL_LORA}},
    "a, kohya": {"base_model": SD15[0], "lora": {"model": SD15_LORA_KOHYA}},
    "a, inversion": {
        "base_model": SD15[0],
        "textual_inversion": SD15_INVERSION,
        "prompt": f"a {INVERSION_TOKEN} cat",
    },
    "a, controlnet": {
        "base_model": SD15[0],
        "controlnet": {
            "model": SD15_CONTROLNET,
            "image_dataurl": PICTURE,
            "preprocess": {"method": "shuffle"},
        },
    },
    "b, vae": {"base_model": SD15[1], "vae": SD15_VAE},
    "blanked": {"base_model": SD15_FLAGS_ALL},
    "sd 2": {"base_model": SD2},
    "xl, refined": {"base_model": SDXL, "refiner": {"model": SDXL_REFINER, "steps": 3}},
    "chat": {"model": LLM, "generation_config": {"max_new_tokens": 8, "do_sample": True}},
    "old": {"base_model": OLD, "prompt": "a dog by the river"},
    "old, controlnet": {
        "base_model": OLD,
        "controlnet": {"model": SD15_CONTROLNET, "image_dataurl": PICTURE},
    },
    "wrong lora": {"base_model": SD15[0], "lora": {"model": SDXL_LORA}},
    "not here": {"base_model": "org/none"},
}


@pytest.fixture(scope="module")
def root(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_models, root, dirs_exist_ok=True)
    shutil.copytree(root / SD15[0], root / OLD)
    file = root / OLD / "scheduler" / "scheduler_config.json"
    unmended = {"steps_offset": 0, "clip_sample": True, "timestep_spacing": "leading"}
    file.write_text(json.dumps(json.loads(file.read_text()) | unmended))
    return root


def order(name: str) -> Order:
    fields, kind = TASKS[name], TaskType.LLM
    if "model" in fields:
        fields = {"messages": [{"role": "user", "content": "what is a cat?"}]} | fields
    else:
        config = {"image_width": 64, "image_height": 64, "steps": 2, "num_images": 2, "seed": 3}
        fields, kind = {"prompt": "a photo of a cat", "task_config": config} | fields, TaskType.SD
    return Order(AttemptId("a"), Commitment("0x01"), kind, json.dumps(fields), None)


def outcome(engine: Engine, name: str, stopped: bool = False) -> object:
    """Files and score, or the error's type."""
    seen: list[int] = []
    try:
        computed = engine.run(
            order(name), lambda: stopped and bool(seen), lambda s, _: seen.append(s)
        )
    except ClusterError as error:
        return type(error).__name__
    return computed.files, computed.score


@pytest.fixture(scope="module", params=DEVICES)
def card(request: pytest.FixtureRequest) -> Device:
    return device_of(request.param)


def new_engine(card: Device, root: Path, device: int = LARGEST, host: int = LARGEST) -> Engine:
    return Engine(card, ModelStore(root), time.time, Limits(device, host, threads=1))


@pytest.fixture(scope="module")
def expected(card: Device, root: Path) -> dict[str, object]:
    """Each task on a card that has never done anything else."""
    return {name: outcome(new_engine(card, root), name) for name in TASKS}


def test_the_tasks_differ(expected: dict[str, object]) -> None:
    pictures = [made for made in expected.values() if isinstance(made, tuple)]
    assert len(pictures) == len(TASKS) - 2
    assert len({made[0][0][1] for made in pictures}) == len(pictures)


@pytest.mark.parametrize("names", [("old", "old, controlnet"), ("old, controlnet", "old")])
def test_a_models_scheduler_stays_as_it_was_read(
    card: Device, root: Path, expected: dict[str, object], names: tuple[str, str]
) -> None:
    engine = new_engine(card, root)
    for name in names:
        assert outcome(engine, name) == expected[name]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    names=st.lists(
        st.tuples(st.sampled_from(sorted(TASKS)), st.booleans()), min_size=2, max_size=7
    ),
    device=st.integers(SMALLEST, LARGEST),
    host=st.sampled_from([0, SMALLEST, LARGEST]),
)
def test_any_sequence_gives_each_task_its_own_bits(
    card: Device,
    root: Path,
    expected: dict[str, object],
    names: list[tuple[str, bool]],
    device: int,
    host: int,
) -> None:
    """In any order, with any of them stopped half-way, on a card of any size."""
    engine = new_engine(card, root, device, host)
    for name, stopped in names:
        made = outcome(engine, name, stopped)
        if stopped:
            assert made in {"Cancelled", expected[name]} if isinstance(made, str) else False
        else:
            assert made == expected[name]
