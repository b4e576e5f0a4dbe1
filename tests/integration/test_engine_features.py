"""Everything that an SD task may ask for, on tiny models: it has an effect and leaves no trace."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cluster.core.errors import (
    ClusterError,
    DeadlinePassed,
    ModelUnavailable,
    TaskInvalid,
    TaskUnsupported,
)
from cluster.core.ports import Computed, Order
from cluster.core.types import AttemptId, Commitment, GigaBytes, TaskType, Timestamp
from cluster.inference.devices import simulated
from cluster.inference.engine import Engine, Limits
from cluster.models.store import ModelStore
from devnet import models

DEVICE = simulated(0, "NVIDIA GeForce RTX 4090+docker", GigaBytes(24))
SD15 = models.SD15[0]
SIDE, STEPS = 64, 3


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Engine:
    return new_engine(tiny_models)


def new_engine(root: Path) -> Engine:
    return Engine(DEVICE, ModelStore(root), time.time, Limits(2**30, 2**30, threads=1))


def order(deadline: float | None = None, **fields: Any) -> Order:
    config = {"image_width": SIDE, "image_height": SIDE, "steps": STEPS, "num_images": 1, "seed": 5}
    task = {"base_model": SD15, "prompt": "a photo of a cat"} | fields
    task["task_config"] = config | fields.get("task_config", {})
    at = None if deadline is None else Timestamp(deadline)
    return Order(AttemptId("a"), Commitment("0x01"), TaskType.SD, json.dumps(task), at)


def run(engine: Engine, **fields: Any) -> Computed:
    return engine.run(order(**fields), lambda: False, lambda _step, _steps: None)


def files(engine: Engine, **fields: Any) -> tuple[tuple[str, bytes], ...]:
    return run(engine, **fields).files


def fault(engine: Engine, **fields: Any) -> ClusterError:
    with pytest.raises(ClusterError) as caught:
        run(engine, **fields)
    return caught.value


def picture(seed: int = 1, size: tuple[int, int] = (96, 64)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def controlled(model: str = models.SD15_CONTROLNET, seed: int = 1, **more: Any) -> dict[str, Any]:
    return {"model": model, "image_dataurl": picture(seed)} | more


REFINED: dict[str, Any] = {
    "base_model": models.SDXL,
    "refiner": {"model": models.SDXL_REFINER, "steps": 4, "denoising_cutoff": 50},
}

EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "controlnet": ({}, {"controlnet": controlled()}),
    "its image": ({"controlnet": controlled()}, {"controlnet": controlled(seed=2)}),
    "its weight": ({"controlnet": controlled()}, {"controlnet": controlled(weight=20)}),
    "its preprocessor": (
        {"controlnet": controlled()},
        {"controlnet": controlled(preprocess={"method": "canny"})},
    ),
    "the preprocessor's arguments": (
        {"controlnet": controlled(preprocess={"method": "canny"})},
        {
            "controlnet": controlled(
                preprocess={
                    "method": "canny",
                    "args": {"low_threshold": 400, "high_threshold": 900},
                }
            )
        },
    ),
    "controlnet with a lora": (
        {"controlnet": controlled()},
        {"controlnet": controlled(), "lora": {"model": models.SD15_LORA}},
    ),
    "controlnet for sdxl": (
        {"base_model": models.SDXL},
        {"base_model": models.SDXL, "controlnet": controlled(models.SDXL_CONTROLNET)},
    ),
    "refiner": ({"base_model": models.SDXL}, REFINED),
    "refiner after a controlnet": (
        {"base_model": models.SDXL, "controlnet": controlled(models.SDXL_CONTROLNET)},
        REFINED | {"controlnet": controlled(models.SDXL_CONTROLNET)},
    ),
    "refiner's cutoff": (
        REFINED,
        REFINED | {"refiner": REFINED["refiner"] | {"denoising_cutoff": 80}},
    ),
    "refiner with a lora": (REFINED, REFINED | {"lora": {"model": models.SDXL_LORA}}),
    "vae": ({}, {"vae": models.SD15_VAE}),
    "unet": ({}, {"unet": models.SD15_UNET}),
    "kohya's lora": ({}, {"lora": {"model": models.SD15_LORA_KOHYA}}),
    "kohya's lora for sdxl": (
        {"base_model": models.SDXL},
        {"base_model": models.SDXL, "lora": {"model": models.SDXL_LORA_KOHYA}},
    ),
    "textual inversion": (
        {"prompt": f"a {models.INVERSION_TOKEN} cat"},
        {
            "prompt": f"a {models.INVERSION_TOKEN} cat",
            "textual_inversion": models.SD15_INVERSION,
        },
    ),
    "sd 2": ({}, {"base_model": models.SD2}),
    "turbo": ({"base_model": models.SDXL}, {"base_model": models.SDXL_TURBO}),
    "half precision": ({}, {"base_model": {"name": SD15, "variant": models.FP16}}),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_it_has_its_effect_and_leaves_no_trace(engine: Engine, name: str) -> None:
    without, with_it = EFFECTS[name]
    before = files(engine, **without)
    changed = files(engine, **with_it)
    assert changed != before
    assert files(engine, **without) == before
    assert files(engine, **with_it) == changed


def test_a_lora_leaves_the_base_on_the_kernels_of_the_networks_nodes(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    before = files(fresh, dtype="float16")
    files(fresh, dtype="float16", lora={"model": models.SD15_LORA})
    held = [part.module for part in fresh._pool._parts.values()]
    assert all(each.requires_grad for module in held for each in module.parameters())
    assert files(fresh, dtype="float16") == before


def test_warm_or_cold_it_is_the_same(engine: Engine, tiny_models: Path) -> None:
    """With everything at once, on a card that has done all of the above and on a new one."""
    everything = REFINED | {
        "controlnet": controlled(models.SDXL_CONTROLNET, preprocess={"method": "canny"}),
        "lora": {"model": models.SDXL_LORA, "weight": 70},
        "task_config": {"num_images": 2},
    }
    made = run(engine, **everything)
    assert len(made.files) == 2
    assert made.files == files(new_engine(tiny_models), **everything)


def test_the_second_image_goes_on_drawing_where_the_first_stopped(engine: Engine) -> None:
    """The refiner draws from the same generator when it follows a ControlNet."""
    refined = REFINED | {"controlnet": controlled(models.SDXL_CONTROLNET)}
    one = files(engine, **refined)
    two = files(engine, **refined, task_config={"num_images": 2})
    assert two[0] == one[0]
    assert two[1][1] != two[0][1]


def test_models_with_equal_parts_share_them(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    run(fresh, base_model=models.SD15[0])
    assert fresh.counts.loads == 3
    run(fresh, base_model=models.SD15[1])
    assert fresh.counts.loads == 4
    run(fresh, controlnet=controlled(), vae=models.SD15_VAE)
    assert fresh.counts.loads == 6
    run(fresh, **REFINED)
    run(fresh, base_model=models.SDXL)
    assert fresh.counts.loads == 6 + 5


def test_adapters_load_nothing_anew(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    run(fresh)
    for fields in (
        {"lora": {"model": models.SD15_LORA}},
        {"textual_inversion": models.SD15_INVERSION},
        {"lora": {"model": models.SD15_LORA_KOHYA}},
        {},
    ):
        run(fresh, **fields)
    assert fresh.counts.loads == 3


def test_the_safety_checker_is_loaded_only_where_it_is_asked_for(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    off = files(fresh, base_model=models.SD15_FLAGS_ALL, task_config={"safety_checker": False})
    assert fresh.counts.loads == 3
    on = files(fresh, base_model=models.SD15_FLAGS_ALL)
    assert fresh.counts.loads == 4
    blank = Image.open(io.BytesIO(on[0][1]))
    assert blank.getextrema() == ((0, 0),) * 3
    assert files(fresh, base_model=models.SD15_FLAGS_NONE) == off


def test_progress_covers_base_and_refiner(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []
    what = order(**REFINED, task_config={"num_images": 2})
    engine.run(what, lambda: False, lambda *step: seen.append(step))
    assert {steps for step, steps in seen if step} == {2 * (STEPS + 4)}
    counts = [step for step, _ in seen]
    assert counts == sorted(counts), "it never goes back, not where the refiner reads the prompt"
    assert 0 == counts[0] <= counts[-1] <= 2 * (STEPS + 4)


def test_a_deadline_stops_the_refiner_too(engine: Engine) -> None:
    ticks: list[int] = []

    def clock() -> float:
        return float(len(ticks))

    slow = new_engine_by(clock, engine)
    with pytest.raises(DeadlinePassed):
        slow.run(order(STEPS + 0.5, **REFINED), lambda: False, lambda *_: ticks.append(1))
    assert len(ticks) < STEPS + 4


def new_engine_by(clock: Any, like: Engine) -> Engine:
    return Engine(DEVICE, like.store, clock, Limits(2**30, 2**30, threads=1))


def test_what_cant_go_together_is_unsupported(engine: Engine) -> None:
    for fields in (
        {"controlnet": controlled(models.SDXL_CONTROLNET)},
        {"refiner": REFINED["refiner"]},
        {"base_model": models.SDXL_REFINER},
        {"base_model": models.SDXL, "refiner": {"model": models.SDXL}},
        {"base_model": models.SDXL, "textual_inversion": models.SDXL_INVERSION},
        {"controlnet": controlled(preprocess={"method": "openpose"})},
        {"base_model": models.SDXL, "unet": models.SD15_UNET},
        {"base_model": models.SD2, "unet": models.SD15_UNET},
        {
            "base_model": models.SDXL,
            "refiner": {"model": models.SDXL_REFINER, "steps": 3},
            "controlnet": controlled(models.SDXL_CONTROLNET),
        },
    ):
        assert isinstance(fault(engine, **fields), TaskUnsupported), fields


@pytest.fixture(scope="module")
def odd(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with parts in which one number is another one than their model's."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(tiny_models, root, dirs_exist_ok=True)
    vae, unet = root / models.SD15_VAE, root / models.SD15_UNET
    made: Any = diffusers.AutoencoderKL
    blocks = {"block_out_channels": [8, 16, 16]}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 3}
    kinds |= {"up_block_types": ["UpDecoderBlock2D"] * 3}
    _another(made, vae, root / "org/16-latents", latent_channels=16)
    _another(made, vae, root / "org/small", **blocks, **kinds)
    made = diffusers.UNet2DConditionModel
    _another(made, unet, root / "org/inpainting", in_channels=9)
    _another(made, unet, root / "org/classes", num_class_embeds=10)
    controlnet, made = root / models.SD15_CONTROLNET, diffusers.ControlNetModel
    _another(made, controlnet, root / "org/wide", block_out_channels=[32, 96])
    for name, vectors in INVERSIONS.items():
        (root / "org" / name).mkdir()
        save_file({"<odd>": vectors}, root / "org" / name / "learned_embeds.safetensors")
    return root


def _another(kind: Any, like: Path, folder: Path, **settings: Any) -> None:
    own = json.loads((like / "config.json").read_text())
    kept = {name: value for name, value in own.items() if not name.startswith("_")}
    torch.manual_seed(1)
    kind(**kept | settings).save_pretrained(folder)


INVERSIONS = {
    "deep": torch.ones(2, 3, 64),
    "whole-numbers": torch.ones(2, 64, dtype=torch.int64),
    "no-vector": torch.ones(()),
    "many": torch.ones(129, 64),
}


@pytest.mark.parametrize(
    "fields",
    [
        {"vae": "org/16-latents"},
        {"vae": "org/small"},
        {"unet": "org/inpainting"},
        {"unet": "org/classes"},
        {"controlnet": controlled("org/wide")},
        *({"textual_inversion": f"org/{name}"} for name in INVERSIONS),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_no_card_can_compute_with_is_unsupported(odd: Path, fields: dict[str, Any]) -> None:
    fresh = new_engine(odd)
    before = files(fresh)
    assert isinstance(fault(fresh, **fields), TaskUnsupported)
    assert files(fresh) == before


def test_as_many_vectors_as_are_ever_written(odd: Path) -> None:
    (odd / "org/enough").mkdir()
    torch.manual_seed(1)
    file = odd / "org/enough/learned_embeds.safetensors"
    save_file({"<odd>": torch.randn(128, 64)}, file)
    assert run(new_engine(odd), textual_inversion="org/enough", prompt="a <odd> cat")


def test_an_image_that_none_can_read(engine: Engine) -> None:
    bad = {"model": models.SD15_CONTROLNET, "image_dataurl": "not a data URL"}
    assert isinstance(fault(engine, controlnet=bad), TaskInvalid | TaskUnsupported)


# --- kept and read ahead ----------------------------------------------------------------------


def test_preloaded_models_never_leave(tiny_models: Path) -> None:
    small = Engine(DEVICE, ModelStore(tiny_models), time.time, Limits(7 * 2**20, 0, threads=1))
    problems = small.preload([SD15, models.LLM, "org/none"])
    assert len(problems) == 1
    assert problems[0].startswith("org/none: ")
    loaded = small.counts.loads
    for base in (models.SD15[1], models.SDXL, models.SD2):
        run(small, base_model=base)
    between = small.counts.loads
    run(small, base_model=SD15)
    assert small.counts.loads == between > loaded
    assert any(key.startswith(f"{SD15}|") for key in small.state().warm)


def read_so_far() -> int:
    """Bytes that this process has asked files for."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what is read by /proc")
def test_reading_ahead_reads_what_isnt_near_and_nothing_else(tiny_models: Path) -> None:
    fresh = new_engine(tiny_models)
    what = order(base_model=models.SD2)
    size = sum(file.stat().st_size for file in (tiny_models / models.SD2).glob("*/*.safetensors"))
    fresh.prefetch(what, lambda: True)
    before = read_so_far()
    fresh.prefetch(what, lambda: True)
    assert size <= read_so_far() - before < 1.2 * size
    before = read_so_far()
    fresh.prefetch(what, lambda: False)
    assert read_so_far() - before < size / 10
    fresh.run(what, lambda: False, lambda _step, _steps: None)
    before = read_so_far()
    fresh.prefetch(what, lambda: True)
    assert read_so_far() - before < size / 10
    with pytest.raises(ModelUnavailable):
        fresh.prefetch(order(base_model="org/none"), lambda: True)


@pytest.mark.parametrize("model", [models.SD15_LORA, models.SD15_LORA_KOHYA])
def test_a_loras_weight_is_a_percentage_or_left_aside(engine: Engine, model: str) -> None:
    """The network's runner leaves it aside: diffusers doesn't read it where it is passed."""
    as_theirs = Engine(DEVICE, engine.store, time.time, Limits(threads=1), full_loras=True)
    half, whole = ({"model": model, "weight": weight} for weight in (50, 100))
    at_full = files(engine, lora=whole)
    assert files(engine, lora=half) != at_full
    assert files(as_theirs, lora=half) == files(as_theirs, lora=whole) == at_full
